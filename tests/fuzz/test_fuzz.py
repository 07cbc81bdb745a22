"""Odd corpora, prompts, configs and command lines: handled exactly, or refused in one line.

A few of each in the main suite, 10,000 in all with `pytest -m fuzz`.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.__main__ import main
from lit_gpt.callbacks.checkpoints import save_atomically
from lit_gpt.command import run as run_command
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.text import files, json_rows, vocabularies
from lit_gpt.text.corpus import load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.vocabularies import Vocabulary, load_tokenizer
from tests.conftest import command_line
from tests.fuzz.examples import check_refusal, examples, numbers


def captured(command: Callable[[], int]) -> tuple[int, str, str]:
    """Status, output and errors of a command."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command()
        out.flush()
        err.flush()
    return status, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


# Texts

END = "\n\n"  # how the end-of-text token between two files decodes
ODD = ["\0", "\ufeff", "\r", "\n", "\r\n", "\r\r\n", "\x85", "\u2028", "\ud800", "\udcff", "\ufffe"]
ODD += ["👩‍👩‍👧", "🇩🇪", "e\u0301", "שלום", "مرحبا", "\u202e", "\u200f", "农夫山泉", "𝒳", "ß", "ſ"]
ODD += ["<|endoftext|>", "\U0010ffff", "\x1b[2J", "\x1a", "%s", "{}", "\\", "'", '"', " ", "a"]
ODD += ["it's", "1"]
texts = st.lists(st.sampled_from(ODD) | st.text(max_size=5), max_size=12).map("".join)
SANE = "".join(x for x in ODD if x not in ("\0", "\ud800", "\udcff"))  # most texts must be kept
sane = st.text(alphabet=SANE, max_size=40) | st.text(max_size=20).map(lambda t: t.replace("\0", ""))
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "gb18030"]
ENCODINGS += [
    "gbk",
    "big5",
    "shift_jis",
    "euc_kr",
    "iso2022_jp",
    "hz",
    "latin-1",
    "cp1252",
    "cp437",
]
ENCODINGS += ["cp437", "ascii", "unicode_escape", "raw_unicode_escape", "cp037", "koi8-r"]
ENCODINGS += ["utf-8", "utf-8"]
BOMS = {
    "utf-8-sig": (codecs.BOM_UTF8,),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
}


def encode(text: str, encoding: str) -> bytes:
    for how in ("surrogatepass", "ignore"):
        with contextlib.suppress(UnicodeError):
            return text.encode(encoding, how)
    return b""


@st.composite
def folders(draw) -> tuple[str, list[bytes]]:
    """An encoding, and files that may or may not be in it."""
    encoding = draw(st.sampled_from(ENCODINGS))
    mark = b"".join(BOMS.get(encoding, [b"\xef\xbb\xbf"])[:1])
    content = st.one_of(
        sane.map(lambda text: encode(text, encoding)),
        sane.map(lambda text: encode(text, encoding)),
        texts.map(lambda text: encode(text, encoding)),
        sane.map(lambda text: mark + encode(text, encoding)),
        texts.map(lambda text: encode(text, "utf-8")),
        st.binary(max_size=20),
    )
    return encoding, draw(st.lists(content, min_size=1, max_size=4))


def read_plainly(encoding: str, contents: list[bytes]) -> tuple[str, int, int] | None:
    """The text, the marks dropped and the ends put between files, the plainest way: whole files.

    None if it must be refused.
    """
    whole = ""
    marks = 0
    ends = 0
    for content in contents:
        try:
            text = content.decode(encoding)
            text.encode()
        except UnicodeError:
            return None
        has_mark = content.startswith(BOMS.get(encoding, ())) if content else False
        if encoding in ("utf-16", "utf-32") and content and not has_mark:
            return None  # which end comes first would be a guess
        if not has_mark and text.startswith("\ufeff"):
            text = text[1:]
            has_mark = True
        marks += has_mark
        if "\0" in text:
            return None
        if whole and text:
            whole += END
            ends += 1
        whole += text
    return (whole, marks, ends) if whole else None


@numbers(100, 4000)
def test_a_corpus_is_kept_exactly_or_refused(number, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabularies, "load_tokenizer", cache(load_tokenizer))
    kinds = [("bytes", True), ("cl100k_base", True)] * 9  # the others take half a second
    kinds += [("cl100k_base", False), ("o200k_base", True)]
    counts = {"kept": 0, "refused": 0}

    @examples(number)
    @given(folders(), st.sampled_from(kinds), st.sampled_from([4, 5, 7, 64, 1 << 20]))
    def check(folder, kind, chunk):
        encoding, contents = folder
        monkeypatch.setattr(files, "CHUNK", chunk)
        texts = tmp_path / "texts"
        texts.mkdir(exist_ok=True)
        for path in texts.iterdir():
            path.unlink()
        for i, content in enumerate(contents):
            (texts / f"{i}.txt").write_bytes(content)
        found = []

        def load() -> None:
            text = TextFiles(str(texts), encoding=encoding, cache=str(tmp_path / "cache"))
            found.append(load_corpus(text, Vocabulary(*kind)))

        status, _, err = captured(lambda: run_command(load))
        expected = read_plainly(encoding, contents)
        counts["kept" if expected else "refused"] += 1
        if expected is None:
            check_refusal(status, err)
            return
        assert (status, err) == (0, "")
        corpus = found[0]
        text = corpus.tokenizer.decode_bytes(corpus.tokens.tolist()).decode()
        info = corpus.info
        assert (text, info.removed_boms, info.file_ends) == expected
        ends = len(END) * info.file_ends
        assert (info.num_characters, info.num_bytes) == (
            len(text) - ends,
            len(text.encode()) - ends,
        )

    check()
    assert min(counts.values()) > number // 10


# Documents

JSON = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    '"',
    '"text"',
    '"messages"',
    '"role"',
    '"content"',
    "null",
    "1",
]
JSON += ["\\u519c", "\\ud83e", "\\udd8a", "\\n", "\\", "\n", " ", "a", "农", "true", "-1e9", "[[[["]
TABLE = [
    "text",
    "id",
    ",",
    "\t",
    '"',
    '""',
    "\n",
    "\r\n",
    "\r",
    "a",
    "1",
    "农",
    "text,id\n",
    "text\tid\n",
]
NAMES = ["x.json", "x.jsonl", "x.ndjson", "x.csv", "x.tsv", "x.json.gz", "x.parquet"]
FIELDS = ["text", "messages", "text.a", ["id", "text"], "", "."]


@numbers(100, 4000)
def test_documents_are_read_or_refused(number, tmp_path, monkeypatch):
    """Also where every row is longer than what is read at once, which changes no outcome."""
    words = [st.lists(st.sampled_from(odd), max_size=25).map("".join) for odd in (JSON, TABLE)]
    rows = st.dictionaries(st.sampled_from(["text", "id", "messages"]), values, min_size=1)
    dumped = st.lists(rows, min_size=1, max_size=3).map(json.dumps)

    def read(path: Path, field: object) -> tuple[int, str, str, list]:
        parts = []
        text = TextFiles(str(path), text_field=field)
        command = lambda: parts.extend(files.Reader(text)) or 0  # noqa: E731
        return (*captured(lambda: run_command(command)), parts)

    @examples(number)
    @given(st.sampled_from(NAMES), words[0] | words[1] | dumped, st.sampled_from(FIELDS))
    def check(name, text, field):
        path = tmp_path / name
        content = encode(text, "utf-8")
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        status, _, err, parts = read(path, field)
        if status:
            check_refusal(status, err)
        with monkeypatch.context() as patch:
            patch.setattr(files, "CHUNK", 5)
            patch.setattr(json_rows, "LONG", 3)
            again = read(path, field)
        assert again[0] == status
        if not status:
            assert "".join(x or "\0" for x in again[3]) == "".join(x or "\0" for x in parts)

    check()


# Prompts

NUMBERS = ["0", "1", "-1", "0.5", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 30, "9" * 5000]
NUMBERS += ["", " 1", "١", "1_0", "0x1", "true", "null", "\0", "\ud800", "1.", "2", "3", "1e3"]
CHOICES = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_samples", "seed"]


@pytest.fixture
def checkpoints(tmp_path) -> list[Path]:
    """Untrained models: of bytes, and of a compact vocabulary."""
    paths = []
    full = load_tokenizer("cl100k_base")
    used = full.encode("hello world 农夫山泉 🙂 <|endoftext|>").tolist()
    for tokenizer in (load_tokenizer("bytes"), full.compact(used)[0]):
        torch.manual_seed(len(paths))
        config = GPTConfig(tokenizer.vocab_size, 8, 8, 1, 1)
        weights = {f"gpt.{name}": value for name, value in GPT(config).state_dict().items()}
        paths.append(tmp_path / f"{len(paths)}.ckpt")
        content = {"gpt": vars(config), "tokenizer": tokenizer.to_dict(), "state_dict": weights}
        save_atomically(content, paths[-1])
    return paths


@numbers(60, 3000)
def test_a_prompt_is_continued_exactly_or_refused(number, checkpoints):
    some = st.dictionaries(st.sampled_from(CHOICES), st.sampled_from(NUMBERS), max_size=2)

    @examples(number)
    @given(st.sampled_from(checkpoints), texts, st.just({}) | some)
    def check(path, prompt, options):
        if str(options.get("num_samples", ""))[:2] == "99":
            return  # that would take a while
        all_options = {"ckpt_path": path, "max_new_tokens": 3, "prompt": prompt} | options
        argv = ["generate", *command_line(all_options)]
        status, out, err = captured(lambda: main(argv))
        if status:
            check_refusal(status, err)
            assert options or any("\ud800" <= x <= "\udfff" for x in prompt)
            assert out == ""
        elif "num_samples" not in options:
            assert out.startswith(prompt or "\n")
            assert err == ""

    check()


# Options

SPECIAL = ["", "last", "~", "~nobody_at_all/x", "..", "a\0b", "😀", "\ud800", "nan", "null", "["]
SPECIAL += ["&a [*a]", "*b", "!!python/name:os.system", "{class_path: os.system}", "-", "9" * 5000]
SPECIAL += ["lit_gpt.callbacks.samples.Samples", "CSVLogger", "x" * 5000, "classic", "bytes"]
SPECIAL += ["a\nb", "١", "{"]
WHOLE = st.integers() | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**40])
scalars = (
    st.none() | st.booleans() | WHOLE | st.floats() | st.sampled_from(SPECIAL) | st.text(max_size=8)
)
CLASS = ["class_path", "init_args", "dict_kwargs", "save_dir", "model", "seed"]
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(CLASS) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture
def parse(monkeypatch):
    """`parse(*argv)`: the training command up to where it would make the model."""
    from lit_gpt.training import lr_finder, train

    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr("sys.stdin", io.StringIO())  # of `--config -`
    monkeypatch.setattr(lr_finder, "find_learning_rate", lambda options: None)
    monkeypatch.setattr(train, "build_run", lambda options: None)
    monkeypatch.setattr(train, "train", lambda run: 0)

    def command(argv: tuple[str, ...]) -> int:
        try:
            return main(["train", *argv])
        except SystemExit as stop:  # --help, --print_config
            return stop.code or 0

    def check(*argv: str) -> None:
        status, _, err = captured(lambda: command(argv))
        if status:
            check_refusal(status, err)

    return check


@pytest.fixture
def names(monkeypatch) -> list[str]:
    """Of all options and groups of them."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    out = io.StringIO()
    leaves = []
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(["train", "--print_config"])

    def walk(tree: dict, prefix: str) -> None:
        for key, value in tree.items():
            leaves.append(prefix + key)
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(yaml.safe_load(out.getvalue()), "")
    return leaves


def nested(options: dict) -> dict:
    tree: dict = {}
    for name, value in options.items():
        *groups, leaf = name.split(".")
        place = tree
        for group in groups:
            if not isinstance(place.get(group), dict):
                place[group] = {}
            place = place[group]
        place[leaf] = value
    return tree


@numbers(15, 2000)
def test_a_config_is_read_or_refused(number, parse, names, tmp_path):
    plain = st.dictionaries(st.sampled_from(names), values, max_size=3)
    files = plain.map(lambda options: encode(yaml.safe_dump(nested(options)), "utf-8"))

    @st.composite
    def damaged(draw) -> bytes:
        content = draw(files)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(content)))
            odd = st.sampled_from([x.encode("utf-8", "surrogatepass") for x in ODD + SPECIAL])
            content = content[:at] + draw(odd | st.binary(max_size=3)) + content[at:]
        return content

    loops = st.sampled_from(names).map(
        lambda name: encode(yaml.safe_dump(nested({name: "LOOP"})), "utf-8")
    )
    loops = loops.map(lambda content: content.replace(b"LOOP", b"&a {class_path: *a, b: [*a]}"))
    other = st.binary(max_size=30) | texts.map(lambda text: encode(text, "utf-8"))

    @examples(number)
    @given(files | files | damaged() | loops | other)
    def check(content):
        (tmp_path / "config.yaml").write_bytes(content)
        parse(f"--config={tmp_path / 'config.yaml'}")

    check()


@numbers(15, 1000)
def test_a_command_line_is_read_or_refused(number, parse, names):
    value = scalars.map(str) | values.map(yaml.safe_dump) | texts
    option = st.tuples(st.sampled_from(names), value).map("--{0[0]}={0[1]}".format)
    word = option | option | st.sampled_from(names).map("--{}".format) | value
    word |= st.sampled_from(["--help", "--print_config", "--config", "--trainer.logger.help"])

    @examples(number)
    @given(st.lists(word.filter(lambda text: "://" not in text), min_size=1, max_size=3))
    def check(words):
        parse(*words)

    check()
