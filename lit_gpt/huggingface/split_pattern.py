"""How a tokenizer.json splits text into pieces, as one regular expression for tiktoken."""

from __future__ import annotations

import re
from typing import Any

from lit_gpt.text import patterns
from lit_gpt.text.patterns import CHARACTERS, KNOWN, check_in_child, gpt2_pattern


class Unsupported(Exception):
    """Says why a tokenizer can't become one of ours."""


def in_one_line(error: Exception) -> str:
    """A message of a library, without backquotes, which mean fields in a UserError."""
    return " ".join(f"{type(error).__name__}: {error}".replace("`", "'").split())[:300]


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


def split_pattern(spec: dict[str, Any], longest_run: int = 1) -> str:
    """The regular expression that splits text; nothing else may be done to the text.

    Args:
        spec: the content of tokenizer.json.
        longest_run: runs of 2, 3, ... spaces up to this many are tokens before anything is split.
    """
    normalizer = spec.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise Unsupported(f"it normalizes text ({normalizer['type']})")
    first = spec.get("pre_tokenizer") or {"type": None}
    steps = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"], ["Digits", "ByteLevel"]):
        raise Unsupported(f"it splits text by {kinds}")
    *before, byte_level = steps
    if byte_level.get("add_prefix_space"):
        raise Unsupported("it adds a space before each text (add_prefix_space)")
    if byte_level.get("use_regex", True):
        if kinds[0] == "Split":
            raise Unsupported("it splits text by two patterns")
        digits = before[0].get("individual_digits", False) if before else None
        return gpt2_pattern(digits, longest_run)
    if longest_run > 1 or kinds[0] == "Digits":
        raise Unsupported(f"it splits text by {kinds}, the last without a pattern")
    if not before:
        if spec["model"]["merges"]:
            raise Unsupported("it does not split text")
        return CHARACTERS
    return _pattern_of(before[0])


def _pattern_of(split: dict[str, Any]) -> str:
    """Of a Split step; the known ones as tiktoken writes them."""
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
