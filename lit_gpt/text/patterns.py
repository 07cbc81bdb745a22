"""Regular expressions that split text into pieces: the known ones, and a check of any other.

A checkpoint or a folder of a stranger may hold any pattern: one that drops text, that matches
nothing (on which tiktoken panics), or that takes forever.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from itertools import product

import tiktoken

CL100K = (  # this one and O200K as in tiktoken_ext/openai_public.py
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")  # also of Qwen3


def gpt2_pattern(digits: bool | None = None, longest_run: int = 1) -> str:
    r"""GPT-2's pattern for text that was split before, where each part is a text of its own.

    Two things end a part, so no alternative may go beyond, and `(?!\S)` has to hold before them.

    Args:
        digits: whether numbers are parts: single digits if true, whole numbers if false; None: no.
        longest_run: runs of 2, 3, ... spaces up to this many are parts.
    """
    pattern = GPT2
    if digits is not None:
        number = r"\p{N}" if digits else r"\p{N}+"
        pattern = pattern.replace(r" ?\p{N}+", number).replace(r"(?!\S)", r"(?![^\s\p{N}])")
    if longest_run > 1:
        run = f" {{2,{longest_run}}}"
        pattern = f"{run}|" + pattern.replace(r"\s+", r"(?:(?!  )\s)+")
    return pattern


SMOLLM = gpt2_pattern(digits=True)  # also of StarCoder
NEOX = gpt2_pattern(longest_run=24)  # of Pythia too
CHARACTERS = r"(?s:.)"  # one at a time
WORDS = r" *[^ \n]+|\n+| +"  # each with the spaces before it, as in SentencePiece's pieces
KNOWN = frozenset({CL100K, O200K, GPT2, R50K, LLAMA3, QWEN2, SMOLLM, NEOX, CHARACTERS, WORDS})

LONGEST = 10_000  # characters of a pattern
SECONDS = 5  # of a core for the check of a pattern, which takes one
TOO_LONG = f"takes over {SECONDS} seconds for the texts that it is tried on"
MEMORY = 1 << 31  # bytes of address space, besides what its imports take
SHORT = 200  # characters of each hostile text
LONG = (4_000, 16_000, 32_000)  # of the SLOWEST of them
SLOWEST = 6
MAX_SECONDS = 0.4  # of a core for any of these texts: 30 times what the longest takes
# One or two of each kind of character: letters with and without case, marks, digits, white space,
# punctuation, symbols, format characters, unassigned and private ones.
KINDS = (
    "aZßǅʰ农ا\u0301\u0903\u20dd7٣Ⅷ½ \n\r\t\u00a0\u2028\u200b\u200d'.,(_-/+€^=😀\0\x7f\u0378\ue000"
)
CHILD = """
import importlib, json, sys
path, module, function = json.loads(sys.argv[1])
sys.path[:] = path
getattr(importlib.import_module(module), function)(sys.stdin.buffer.read().decode())
"""


def check_pattern(pattern: str) -> None:
    """Refuses a pattern that tiktoken can't split every text with, without loss, in linear time.

    Raises:
        ValueError: it drops text, matches nothing, takes too long or is invalid.
    """
    if pattern not in KNOWN:
        check_in_child(__name__, try_tiktoken.__name__, pattern)


@cache
def check_in_child(module: str, function: str, pattern: str) -> None:
    """Calls a function with a pattern in a process with limits, as a regex can't be interrupted.

    Raises:
        ValueError: what `refuse` was called with, or that it crashed or ran out of time.
    """
    if len(pattern) > LONGEST:
        raise ValueError(f"its split pattern is longer than {LONGEST:,} characters")
    code = [sys.executable, "-I", "-c", CHILD, json.dumps([sys.path, module, function])]
    pipe = subprocess.PIPE
    process = subprocess.Popen(code, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    try:
        # A busy machine may give it a small part of a core.
        output, _ = process.communicate(pattern.encode("utf-8", "replace"), timeout=10 * SECONDS)
        problem = output.decode().strip()
    except subprocess.TimeoutExpired:
        problem = TOO_LONG
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        if process.returncode == -getattr(signal, "SIGXCPU", 0):
            problem = TOO_LONG
        problem = problem or "crashes on some texts"
        raise ValueError(f"its split pattern {problem} ({pattern[:100]!r})")


def refuse(problem: str) -> None:
    """Ends the child."""
    print(problem)
    sys.exit(1)


def limit_resources() -> None:
    """Of this process, where the system can."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        import psutil

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, 2 * SECONDS))  # SIGXCPU, then SIGKILL
        size = psutil.Process().memory_info().vms + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def try_tiktoken(pattern: str) -> None:
    """In the child: tries a pattern as the Tokenizer uses it."""
    limit_resources()
    ranks = {bytes([byte]): byte for byte in range(256)}

    def split(text: str) -> str:
        return bytes(encoding.encode(text, disallowed_special=())).decode("utf-8", "replace")

    try:
        encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        refuse(f"is invalid here ({' '.join(str(error).split())[:200]})")
    try_pattern(pattern, split)


def try_pattern(pattern: str, split: Callable[[str], str]) -> None:
    """In the child: refuses a pattern by what it does to hostile texts.

    Args:
        split: splits a text and joins the pieces.
    """
    texts = list(hostile_texts(pattern))
    passes = [[seconds(split, text) for text in texts] for _ in range(2)]  # others disturb it
    times = [min(each) for each in zip(*passes, strict=True)]
    for _, text in sorted(zip(times, texts, strict=True))[-SLOWEST:]:
        for size in LONG:
            seconds(split, repeated(text, size))
    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    for start in range(0, len(characters), SHORT):
        seconds(split, characters[start : start + SHORT])


def seconds(split: Callable[[str], str], text: str) -> float:
    """How long a text takes, if that is not too long and nothing of it is lost."""
    start = time.perf_counter()
    start_of_core = time.process_time()  # exact only for long ones
    try:
        joined = split(text)
    except ValueError as error:
        refuse(f"gives up on some texts ({str(error)[:200]})")
    taken = time.process_time() - start_of_core
    if joined != text:
        refuse("drops text")
    if taken > MAX_SECONDS:
        refuse(f"takes {taken:.1f} seconds for {len(text):,} characters")
    return time.perf_counter() - start


def repeated(text: str, size: int) -> str:
    """A hostile text of another length: all but the last character are repeated."""
    return (text[:-1] * (size // len(text) + 1))[:size] + text[-1]


def hostile_texts(pattern: str) -> Iterator[str]:
    """Runs of each kind of character and of the pattern's own, ended by another; mixtures."""
    plain = re.sub(r"\\[pP]\{[^}]*\}|\\[a-zA-Z]|\(\?[a-zA-Z]*:?", " ", pattern)
    words = dict.fromkeys(re.findall(r"[^\W_]{2,20}", plain))
    own = dict.fromkeys([*re.sub(r"[\s\\]", "", plain)][:200])
    atoms = list(dict.fromkeys([*KINDS, *list(own)[:40], *list(words)[:10]]))
    yield ""
    for atom, end in product(atoms, atoms):
        yield (atom * SHORT)[:SHORT] + end
        yield ((atom + end) * SHORT)[:SHORT] + "!"
    generator = random.Random(0)
    for _ in range(500):
        yield "".join(generator.choices(atoms, k=generator.randint(1, 12)))
