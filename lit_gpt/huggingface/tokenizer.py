"""Our Tokenizer as Hugging Face's tokenizer.json and back: byte-level BPE with the same ids.

transformers, and with it the package tokenizers, is imported only where it is used.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.huggingface.folder import MAX_JSON, read_json
from lit_gpt.text import patterns
from lit_gpt.text.patterns import CHARACTERS, GPT2, KNOWN, QWEN2, check_in_child, check_pattern
from lit_gpt.text.tokenizer import Tokenizer

SPECIAL = "<|endoftext|>"  # what our end-of-text token is called, as in GPT-2 and Qwen3
NAME = "of a Hugging Face folder"
# How the text of a vocab.json with a merges.txt is split, by the model_type of its config.json.
SPLIT_BY = {"gpt2": GPT2, "qwen2": QWEN2, "qwen3": QWEN2}


def import_transformers() -> Any:
    """The package transformers, silenced except for errors.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "Hugging Face folders need the package transformers",
            hint='install it with pip install -e ".[hf]"',
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def to_hf(tokenizer: Tokenizer) -> Any:
    """A tokenizers.Tokenizer that gives any text the same ids.

    Our end-of-text token becomes the special token SPECIAL. With `split_special_tokens`, a text
    that contains these characters is still encoded as plain text.

    Raises:
        UserError: a split pattern that the package tokenizers does not support, or a vocabulary
            with SPECIAL as an ordinary token; transformers is not installed.
    """
    import_transformers()
    from tokenizers import pre_tokenizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = tokenizer.ranks
    only_bytes = len(ranks) == 256  # nothing to merge, so it doesn't matter how text is split
    pattern = "." if only_bytes else onig_pattern(tokenizer.pattern)
    converter: Any = TikTokenConverter(pattern=pattern)
    converter.load_tiktoken_bpe = lambda _: ranks  # instead of reading them from a file
    try:
        if not (only_bytes or tokenizer.pattern in KNOWN):
            check_in_child(__name__, try_oniguruma.__name__, pattern)
        converted = converter.converted()
    except Exception as error:  # tokenizers raises nothing more specific
        what = f"the tokenizer's split pattern {tokenizer.pattern!r}"
        raise UserError(f"{what} can't be exported ({in_one_line(error)})") from error
    if only_bytes:
        converted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if tokenizer.end_of_text is not None:
        if SPECIAL.encode() in ranks:
            raise UserError(
                f"the vocabulary has {SPECIAL} as an ordinary token, so the end-of-text token "
                "can't be exported under that name"
            )
        converted.add_special_tokens([SPECIAL])
    assert converted.get_vocab_size() == tokenizer.vocab_size
    return converted


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """tokenizer_config.json. In a text, AutoTokenizer takes SPECIAL for the token, as TRL needs."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # GPT2Tokenizer has its own split pattern
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    if tokenizer.end_of_text is None:
        return config
    # No text becomes unk, but CTranslate2 wants one.
    return config | {f"{role}_token": SPECIAL for role in (*special_ids(tokenizer), "unk")}


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids of the tokens that other programs need: what begins, ends and pads a text.

    All are the end of text, as in GPT-2; None where the tokenizer has none.
    """
    return dict.fromkeys(("bos", "eos", "pad"), tokenizer.end_of_text)


def onig_pattern(pattern: str) -> str:
    """A tiktoken pattern for Oniguruma, where `{1,3}+` repeats and `$` matches at each line end.

    In the patterns we know, a possessive `{1,3}+` ends an alternative, so a plain one matches the
    same text.
    """
    if pattern == CHARACTERS:
        return "(?m:.)"
    return re.sub(r"(\{\d+,\d+\})\+", r"\1", pattern).replace(r"\s++$", r"\s++\z")


def try_oniguruma(pattern: str) -> None:
    """In a child: tries a pattern as the package tokenizers uses it."""
    patterns.limit_resources()
    from tokenizers import Regex, pre_tokenizers

    try:
        splitter = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    except Exception as error:  # tokenizers raises nothing more specific
        patterns.refuse(f"is invalid here ({in_one_line(error)})")
    patterns.try_pattern(
        pattern, lambda text: "".join(part for part, _ in splitter.pre_tokenize_str(text))
    )


def from_hf(source: str | Path) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer of a folder or of a tokenizer.json, and their id of each of ours, (V,) int64.

    Our ids count the 256 bytes, then the merges in their order, and last the end-of-text token:
    SPECIAL, or else the folder's eos token. Other special tokens and unused rows are left out.
    Text stays exactly as it is: Qwen's normal form (NFC) is not applied.

    Raises:
        UserError: not a byte-level BPE, or one that works differently from ours; transformers is
            not installed.
    """
    spec = read_spec(source)
    try:
        pattern = _pattern(spec)
        ids = _ordinary_ids(spec)
        tokenizer = _build(pattern, list(ids))
        rows = list(ids.values())
        end = _end_of_text(spec, folder_of(source) / "tokenizer_config.json", ids)
    except Unsupported as error:
        raise UserError(
            f"the tokenizer of {source} is not supported: {error}",
            hint="use one with byte-level BPE like that of GPT-2 or Qwen3",
        ) from error
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise unreadable(source, error) from error
    if end is not None:
        tokenizer = tokenizer.with_end_of_text()
        rows.append(end)
    return tokenizer, np.array(rows, dtype=np.int64)


def folder_of(source: str | Path) -> Path:
    """Of a folder, or of a file in it."""
    path = Path(source).expanduser()
    return path.parent if path.is_file() else path


def read_spec(source: str | Path) -> dict[str, Any]:
    """The content of tokenizer.json, or its equivalent for a vocab.json with a merges.txt."""
    import_transformers()
    path, folder = Path(source).expanduser(), folder_of(source)
    path = path if path.is_file() else folder / "tokenizer.json"
    has_merges = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if str(source).endswith(".json") and not path.is_file():
        raise UserError("no such file", field="tokenizer", value=str(source))
    if not (path.is_file() or has_merges):
        raise UserError(f"{source} has no tokenizer.json, nor a vocab.json with a merges.txt")
    try:
        return read_json(path) if path.is_file() else _old_spec(folder)
    except Exception as error:  # a stranger's file can raise anything
        raise unreadable(source, error) from error


def _old_spec(folder: Path) -> dict[str, Any]:
    """What tokenizer.json would hold, for a vocab.json with a merges.txt."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in list(SPLIT_BY):
        raise ValueError(f"without tokenizer.json, its model_type must be {' or '.join(SPLIT_BY)}")
    with (folder / "merges.txt").open(encoding="utf-8", newline="\n") as file:
        lines = file.read(MAX_JSON).split("\n")
    added: dict[str, Any] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            decoder = content.get("added_tokens_decoder", {})
            added |= {token["content"]: int(i) for i, token in decoder.items()}
            added |= content if name == "added_tokens.json" else {}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_BY[kind]}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": [{"content": text, "id": i} for text, i in added.items()],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, byte_level | {"use_regex": False}],
        },
        "model": {
            "type": "BPE",
            "vocab": read_json(folder / "vocab.json"),
            "merges": [line for line in lines if line and not line.startswith("#version")],
        },
    }


def in_one_line(error: Exception) -> str:
    """A message of a library, without backquotes, which mean fields in a UserError."""
    return " ".join(f"{type(error).__name__}: {error}".replace("`", "'").split())[:300]


def unreadable(folder: str | Path, error: Exception) -> UserError:
    return UserError(f"the tokenizer of {folder} can't be read ({in_one_line(error)})")


class Unsupported(Exception):
    """Says why a tokenizer can't become one of ours."""


def _pattern(spec: dict[str, Any]) -> str:
    """The regular expression that splits text; nothing else may be done to the text."""
    normalizer = spec.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise Unsupported(f"it normalizes text ({normalizer['type']})")
    first = spec.get("pre_tokenizer") or {"type": None}
    steps = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise Unsupported(f"it splits text by {kinds}")
    *splits, byte_level = steps
    if byte_level.get("add_prefix_space"):
        raise Unsupported("it adds a space before each text (add_prefix_space)")
    if byte_level.get("use_regex", True):
        if splits:
            raise Unsupported("it splits text by two patterns")
        return GPT2
    if not splits:
        if spec["model"]["merges"]:
            raise Unsupported("it does not split text")
        return CHARACTERS
    (split,) = splits
    behavior = (split["behavior"], split.get("invert", False))
    if behavior not in (("Isolated", False), ("Removed", True)) or "Regex" not in split["pattern"]:
        raise Unsupported(f"it splits text by {split}")
    regex = split["pattern"]["Regex"]
    ours = {onig_pattern(known): known for known in KNOWN}
    if regex not in ours:
        try:
            check_in_child(__name__, try_oniguruma.__name__, regex)
        except ValueError as error:
            raise Unsupported(str(error)) from error
    return ours.get(regex, regex)


def _ordinary_ids(spec: dict[str, Any]) -> dict[bytes, int]:
    """Their id of each token that text can become, in the order of our ids."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    model = spec["model"]
    bytes_of = {char: byte for byte, char in bytes_to_unicode().items()}
    if model.get("type", "BPE") != "BPE":
        raise Unsupported(f"it is a {model['type']}, not a byte-pair encoding")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise Unsupported(f"it has {option} {model[option]!r}")
    vocab = model["vocab"]
    if missing := sorted(byte for char, byte in bytes_of.items() if vocab.get(char) is None):
        count = f"{len(missing)} of the 256 bytes (the first is 0x{missing[0]:02x})"
        raise Unsupported(f"it has no token for {count}")
    if not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise Unsupported("it has ids that are not integers")
    singles = sorted(bytes_of, key=vocab.__getitem__)
    ids: dict[bytes, int] = {bytes([bytes_of[char]]): vocab[char] for char in singles}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = bytes(bytes_of[char] for char in left + right)
        ids.setdefault(token, vocab[left + right])
    if model.get("ignore_merges"):  # whole pieces are looked up first, as in tiktoken
        merged = list(ids.values())[256:]
        special = {token["content"] for token in spec.get("added_tokens", [])}
        for text in sorted(vocab.keys() - special, key=vocab.__getitem__):
            if text and bytes_of.keys() >= set(text):
                ids.setdefault(bytes(bytes_of[char] for char in text), vocab[text])
        if merged == sorted(merged):  # then tokens without merges are ordered by their ids, too
            ids = dict(sorted(ids.items(), key=lambda pair: (len(pair[0]) > 1, pair[1])))
    return ids


def _build(pattern: str, tokens: list[bytes]) -> Tokenizer:
    """Our tokenizer, if the pattern keeps all of a text."""
    if b"" in tokens:
        raise Unsupported("it has an empty token")
    try:
        check_pattern(pattern)
    except ValueError as error:
        raise Unsupported(str(error)) from error
    return Tokenizer(NAME, pattern, tokens)


def _end_of_text(spec: dict[str, Any], config: Path, ordinary: dict[bytes, int]) -> int | None:
    """Their id of the token that ends a document; None if there is none."""
    ids = spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
    names = [SPECIAL]
    if config.is_file():
        eos = read_json(config).get("eos_token")
        names.append(str(eos["content"] if isinstance(eos, dict) else eos))
    used = set(ordinary.values())
    return next((ids[name] for name in names if name in ids and ids[name] not in used), None)
