"""Our Tokenizer as Hugging Face's tokenizer.json and back: byte-level BPE with the same ids.

transformers, and with it the package tokenizers, is imported only where it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.huggingface.folder import MAX_JSON, read_json
from lit_gpt.huggingface.special_tokens import read_special
from lit_gpt.huggingface.split_pattern import (
    Unsupported,
    in_one_line,
    onig_pattern,
    split_pattern,
    try_oniguruma,
)
from lit_gpt.text.byte_gaps import check_has_bytes
from lit_gpt.text.patterns import GPT2, KNOWN, QWEN2, check_in_child, check_pattern
from lit_gpt.text.tokenizer import END_NAME, Tokenizer

SPECIAL = END_NAME
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
            check_in_child(try_oniguruma.__module__, try_oniguruma.__name__, pattern)
        converted = converter.converted()
    except Exception as error:  # tokenizers raises nothing more specific
        what = f"the tokenizer's split pattern {tokenizer.pattern!r}"
        raise UserError(f"{what} can't be exported ({in_one_line(error)})") from error
    if only_bytes:
        converted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    _add_special(converted, tokenizer)
    assert converted.get_vocab_size() == tokenizer.vocab_size
    return converted


def _add_special(converted: Any, tokenizer: Tokenizer) -> None:
    """Gives a tokenizers.Tokenizer the special tokens, and those that start each text."""
    from tokenizers import AddedToken, processors

    for name in tokenizer.special:
        if name.encode() in tokenizer.ranks:
            raise UserError(
                f"the vocabulary has {name} as an ordinary token, so the special token can't be "
                "exported under that name"
            )
    hidden = tokenizer.special.keys() - tokenizer.visible_names
    converted.add_tokens(
        [AddedToken(name, special=name in hidden, normalized=False) for name in tokenizer.special]
    )
    if tokenizer.start_names:
        starts = [(name, tokenizer.special[name]) for name in tokenizer.start_names]
        single = [*tokenizer.start_names, "$A"]
        template = processors.TemplateProcessing(single=single, special_tokens=starts)
        converted.post_processor = processors.Sequence([converted.post_processor, template])


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """tokenizer_config.json. In a text, AutoTokenizer takes SPECIAL for the token, as TRL needs."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # GPT2Tokenizer has its own split pattern
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    if tokenizer.end_of_text is None:
        return config | tokenizer.special_roles
    # No text becomes unk, but CTranslate2 wants one.
    needed = [f"{role}_token" for role in (*special_ids(tokenizer), "unk")]
    template = tokenizer.chat_template or ""
    # A chat template may ask whether there is one.
    own = dict.fromkeys([role for role in needed if role not in template], end_name(tokenizer))
    return config | own | tokenizer.special_roles


def end_name(tokenizer: Tokenizer) -> str:
    """What the end-of-text token is called."""
    return next(name for name, i in tokenizer.special.items() if i == tokenizer.end_of_text)


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids of the tokens that other programs need: what begins, ends and pads a text.

    All are the end of text, as in GPT-2, unless an imported model has others; None where the
    tokenizer has none.
    """
    named = {role: tokenizer.special_roles.get(f"{role}_token") for role in ("bos", "eos", "pad")}
    end = tokenizer.end_of_text
    return {role: tokenizer.special[name] if name else end for role, name in named.items()}


def from_hf(source: str | Path) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer of a folder or of a tokenizer.json, and their id of each of ours, (V,) int64.

    Our ids count the bytes, then the merges in their order, the special tokens, and last the end of
    text: SPECIAL, or else the folder's eos token. Unused rows are left out. Text stays exactly as
    it is: Qwen's normal form (NFC) is not applied.

    Raises:
        UserError: not a byte-level BPE, or one that works differently from ours; transformers is
            not installed.
    """
    spec = read_spec(source)
    try:
        ids = _ordinary_ids(spec)
        pattern = split_pattern(spec, max(map(len, added_spaces(spec)), default=1))
        special = read_special(spec, folder_of(source), set(ids.values()))
        tokenizer = special.add_to(_build(pattern, list(ids)))
    except Unsupported as error:
        raise UserError(
            f"the tokenizer of {source} is not supported: {error}",
            hint="use one with byte-level BPE like that of GPT-2, Llama 3 or Qwen3",
        ) from error
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise unreadable(source, error) from error
    return tokenizer, np.array([*ids.values(), *special.ids.values()], dtype=np.int64)


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
    shown: set[str] = set()
    for name in ("added_tokens.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            decoder = content.get("added_tokens_decoder", {})
            added |= {token["content"]: int(i) for i, token in decoder.items()}
            shown |= {x["content"] for x in decoder.values() if x.get("special") is False}
            added |= content if name == "added_tokens.json" else {}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_BY[kind]}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"content": text, "id": i, "special": text not in shown} for text, i in added.items()
        ],
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


def unreadable(folder: str | Path, error: Exception) -> UserError:
    return UserError(f"the tokenizer of {folder} can't be read ({in_one_line(error)})")


def _ordinary_ids(spec: dict[str, Any]) -> dict[bytes, int]:
    """Their id of each token that text can become, in the order of our ids."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    model = spec["model"]
    bytes_of = {char: byte for byte, char in bytes_to_unicode().items()}
    if model.get("type", "BPE") != "BPE":
        raise Unsupported(f"it is a {model['type']}, not a byte-pair encoding")
    if model.get("byte_fallback"):
        raise Unsupported(
            "it is SentencePiece's byte-pair encoding, as of Llama 2, TinyLlama and Mistral 7B, "
            "which joins characters, not bytes, and puts a space before each text"
        )
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise Unsupported(f"it has {option} {model[option]!r}")
    vocab = model["vocab"]
    if not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise Unsupported("it has ids that are not integers")
    singles = sorted(bytes_of.keys() & vocab.keys(), key=vocab.__getitem__)
    ids: dict[bytes, int] = {bytes([bytes_of[char]]): vocab[char] for char in singles}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = bytes(bytes_of[char] for char in left + right)
        ids.setdefault(token, vocab[left + right])
    if model.get("ignore_merges"):  # whole pieces are looked up first, as in tiktoken
        merged = list(ids.values())[len(singles) :]
        special = {token["content"] for token in spec.get("added_tokens", [])}
        for text in sorted(vocab.keys() - special, key=vocab.__getitem__):
            if text and bytes_of.keys() >= set(text):
                ids.setdefault(bytes(bytes_of[char] for char in text), vocab[text])
        if merged == sorted(merged):  # then tokens without merges are ordered by their ids, too
            ids = dict(sorted(ids.items(), key=lambda pair: (len(pair[0]) > 1, pair[1])))
    return ids | {name.encode(): i for name, i in added_spaces(spec).items()}


def added_spaces(spec: dict[str, Any]) -> dict[str, int]:
    """GPT-NeoX's tokens of 2, 3, ... spaces, which are found before the text is split.

    They are the only added tokens that plain text becomes.
    """
    added = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    spaces = {name: i for name, i in added.items() if len(name) > 1 and not name.strip(" ")}
    if sorted(map(len, spaces)) != list(range(2, len(spaces) + 2)):
        raise Unsupported("its added tokens of spaces are not of 2, 3, ... spaces")
    return spaces


def _build(pattern: str, tokens: list[bytes]) -> Tokenizer:
    """Our tokenizer, if the pattern keeps all of a text."""
    if b"" in tokens:
        raise Unsupported("it has an empty token")
    try:
        check_has_bytes(set(tokens))
        check_pattern(pattern)
    except ValueError as error:
        raise Unsupported(str(error)) from error
    return Tokenizer(NAME, pattern, tokens)
