"""Owns our Tokenizer <-> Hugging Face's tokenizer.json: byte-level BPE with the same ids.

Needs transformers, and with it the package tokenizers: imported here only where they are used.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.text.tokenizer import OFFLINE, Tokenizer

SPECIAL = "<|endoftext|>"  # the name of our end-of-text token there, as GPT-2 and Qwen3 have it
NAME = "of a Hugging Face folder"
GPT2_PATTERN = (  # what ByteLevel(use_regex=True) splits by
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


def import_transformers() -> Any:
    """The package, which from now on says nothing but errors.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            'a Hugging Face folder needs the package transformers: pip install -e ".[hf]"'
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def to_hf(tokenizer: Tokenizer) -> Any:
    """A tokenizers.Tokenizer that gives text the same ids.

    Its end-of-text token is the special token SPECIAL. That text itself is encoded as plain
    characters where `tokenizer_config` lies beside it (tokenizer.json can't say so).

    Raises:
        UserError: a pattern that isn't known there, or a vocabulary in which SPECIAL is an
            ordinary token too; no transformers.
    """
    import_transformers()
    from tokenizers import AddedToken, pre_tokenizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = tokenizer.ranks
    converter = TikTokenConverter(pattern=onig_pattern(tokenizer.pattern))
    converter.load_tiktoken_bpe = lambda _: ranks  # instead of reading them from a file
    if len(ranks) == 256:  # nothing to merge, so nothing to split: any pattern will do
        converter.pattern = "."
    try:
        converted = converter.converted()
    except Exception as error:  # it has no class of its own
        raise UserError(
            f"the pattern that splits text, {tokenizer.pattern!r}, can't be had there ({error})"
        ) from error
    if len(ranks) == 256:
        converted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if tokenizer.end_of_text is not None:
        if SPECIAL.encode() in ranks:
            raise UserError(
                f"the vocabulary has {SPECIAL} as an ordinary token, so the end of a document "
                "can't go by that name"
            )
        converted.add_special_tokens([AddedToken(SPECIAL, normalized=False, special=True)])
    assert converted.get_vocab_size() == tokenizer.vocab_size
    return converted


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """tokenizer_config.json, with which AutoTokenizer treats all text as ordinary text."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # GPT2Tokenizer has a pattern of its own
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": context_length,
    }
    return config if tokenizer.end_of_text is None else config | {"eos_token": SPECIAL}


def onig_pattern(pattern: str) -> str:
    """A pattern of tiktoken's as Oniguruma reads it, where `{1,3}+` repeats, and `$` ends a line.

    Ours end with it, or are followed by an alternative, so nothing is lost without possession.
    """
    return re.sub(r"(\{\d+,\d+\})\+", r"\1", pattern).replace(r"\s++$", r"\s++\z")


def from_hf(folder: str | Path) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer of a folder, and which row of its embedding each of our ids is, (V,) int64.

    Ids count the 256 bytes, then the merges in their order, and last the end-of-text token:
    SPECIAL, or else the folder's eos token. Its other special tokens and rows that are no token's
    are left out. Text is kept exactly as it is, so Qwen's normal form (NFC) is not applied.

    Raises:
        UserError: a tokenizer that is no byte-level BPE, or does what ours can't; no transformers.
    """
    folder = Path(folder).expanduser()
    spec = read_spec(folder)
    try:
        pattern = _pattern(spec, folder)
        ids = _ordinary_ids(spec, folder)
        tokenizer = _try(pattern, list(ids), folder)
        rows = list(ids.values())
        end = _end_of_text(spec, folder, set(rows))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unreadable(folder, error) from error
    if end is not None:
        tokenizer, rows = tokenizer.with_end_of_text(), [*rows, end]
    return tokenizer, np.array(rows, dtype=np.int64)


def read_spec(folder: Path) -> dict[str, Any]:
    """What is in tokenizer.json; made of vocab.json and merges.txt where there is none."""
    transformers = import_transformers()
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            spec = json.loads(path.read_text(encoding="utf-8"))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            auto = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            spec = json.loads(auto.backend_tokenizer.to_str())
        else:
            raise UserError(f"{folder} has no tokenizer.json, nor a vocab.json with a merges.txt")
        if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
            raise ValueError("no model in it")
    except UserError:
        raise
    except Exception as error:  # whatever a foreign file can raise
        raise unreadable(folder, error) from error
    return spec


def unreadable(folder: Path, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return UserError(f"the tokenizer of {folder} can't be read ({reason})")


def _refused(folder: Path, why: str) -> UserError:
    return UserError(
        f"the tokenizer of {folder} {why}: only byte-level BPE as GPT-2's and Qwen3's can be taken"
    )


def _pattern(spec: dict[str, Any], folder: Path) -> str:
    """The regular expression that splits text; refuses all that would be done to it besides."""
    normalizer = spec.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refused(folder, f"changes the text before it splits it ({normalizer['type']})")
    first = spec.get("pre_tokenizer") or {"type": None}
    steps = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise _refused(folder, f"splits text in a way that is not known here ({kinds})")
    if steps[-1].get("add_prefix_space"):
        raise _refused(folder, "puts a blank before each text (add_prefix_space)")
    by_itself = steps[-1].get("use_regex", True)
    if len(steps) == 1 and (by_itself or not spec["model"]["merges"]):
        return GPT2_PATTERN if by_itself else r"(?s:.)"
    if by_itself is (len(steps) == 2):
        raise _refused(folder, "splits text by two patterns, or by none")
    how = steps[0]["behavior"], steps[0].get("invert", False)
    if how not in (("Isolated", False), ("Removed", True)) or "Regex" not in steps[0]["pattern"]:
        raise _refused(folder, f"splits text in a way that is not known here ({steps[0]})")
    regex = steps[0]["pattern"]["Regex"]
    ours = {onig_pattern(pattern): pattern for pattern, *_ in OFFLINE.values()}
    return ours.get(regex, regex)


def _ordinary_ids(spec: dict[str, Any], folder: Path) -> dict[bytes, int]:
    """The id there of each token that text becomes, in the order of our ids."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    model, bytes_of = spec["model"], {char: byte for byte, char in bytes_to_unicode().items()}
    if model.get("type", "BPE") != "BPE":
        raise _refused(folder, f"is no byte-pair encoding but {model['type']}")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _refused(folder, f"has {option} {model[option]!r}")
    vocab = model["vocab"]
    singles = {bytes([byte]): vocab.get(char) for char, byte in bytes_of.items()}
    if missing := sorted(token[0] for token, number in singles.items() if number is None):
        raise _refused(
            folder, f"has no token for {len(missing)} of the 256 bytes (0x{missing[0]:02x} first)"
        )
    ids = dict(sorted(singles.items(), key=lambda pair: pair[1]))
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = bytes(bytes_of[char] for char in left + right)
        ids.setdefault(token, vocab[left + right])
    if model.get("ignore_merges"):  # a token is found as a whole piece too, as tiktoken does
        merged = list(ids.values())[256:]
        special = {token["content"] for token in spec.get("added_tokens", [])}
        for text, number in sorted(vocab.items(), key=lambda pair: pair[1]):
            if text not in special and text and bytes_of.keys() >= set(text):
                ids.setdefault(bytes(bytes_of[char] for char in text), number)
        if merged == sorted(merged):  # ids tell the order, also of tokens that no merges lead to
            ids = dict(list(ids.items())[:256] + sorted(list(ids.items())[256:], key=_by_id))
    return ids


def _by_id(pair: tuple[bytes, int]) -> int:
    return pair[1]


def _try(pattern: str, tokens: list[bytes], folder: Path) -> Tokenizer:
    """Ours, with a pattern that tiktoken's engine takes, and that leaves out none of a text."""
    sample = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    try:
        tokenizer = Tokenizer(NAME, pattern, tokens)
        kept = tokenizer.decode(tokenizer.encode(sample)) == sample
    except ValueError as error:  # what tiktoken says of a pattern
        raise _refused(folder, f"splits text by a pattern that can't be taken ({error})") from error
    if not kept:
        raise _refused(folder, f"splits text by a pattern that leaves out some of it ({pattern})")
    return tokenizer


def _end_of_text(spec: dict[str, Any], folder: Path, ordinary: set[int]) -> int | None:
    """The id there of the token that ends a document; None where there is none."""
    ids = spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
    names = [SPECIAL]
    path = folder / "tokenizer_config.json"
    if path.is_file():
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        names.append(eos["content"] if isinstance(eos, dict) else eos)
    found = (ids[name] for name in names if name in ids and ids[name] not in ordinary)
    return next(found, None)
