"""The special tokens and the chat template of a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.huggingface.folder import read_json
from lit_gpt.huggingface.split_pattern import Unsupported
from lit_gpt.storage import read_limited
from lit_gpt.text.chat import LONGEST, check_template
from lit_gpt.text.tokenizer import END_NAME, Tokenizer

ENDS = (END_NAME, "<|end_of_text|>")  # of a document, where a chat model's eos ends an answer
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
TEMPLATE = "chat_template.jinja"
CHANGES_TEXT = ("lstrip", "rstrip", "single_word")  # of an added token


@dataclass(frozen=True)
class SpecialTokens:
    """What a folder says about tokens that no plain text becomes.

    Args:
        ids: theirs, by name, in the order of ours; the end of text is the last.
        end: the name of the end of text; None: there is none.
        roles: what the chat template calls some of them.
        start_names: those that come before a prompt.
        end_names: those that end an answer, besides `end`.
        visible_names: those that are text to a reader, as Qwen3's <think>.
        chat_template: a Jinja program; None: there is none.
    """

    ids: dict[str, int]
    end: str | None
    roles: dict[str, str]
    start_names: list[str]
    end_names: list[str]
    visible_names: list[str]
    chat_template: str | None

    def add_to(self, tokenizer: Tokenizer) -> Tokenizer:
        names = [name for name in self.ids if name != self.end]
        own = {role: name for role, name in self.roles.items() if name != self.end}
        starts = [name for name in self.start_names if name != self.end]
        tokenizer = tokenizer.with_special(names, own, starts, self.end_names, self.visible_names)
        if self.end is not None:
            tokenizer = tokenizer.with_end_of_text(self.end)
        tokenizer.special_roles = tokenizer.special_roles | self.roles
        tokenizer.start_names = self.start_names
        tokenizer.chat_template = self.chat_template
        return tokenizer


def read_special(spec: dict[str, Any], folder: Path, ordinary: set[int]) -> SpecialTokens:
    """The special tokens of a tokenizer.json and of the files beside it.

    Args:
        spec: the content of tokenizer.json.
        ordinary: ids of the tokens that plain text becomes.
    """
    config = _content(folder / "special_tokens_map.json") | _content(
        folder / "tokenizer_config.json"
    )
    added = sorted(spec.get("added_tokens", []), key=lambda token: token["id"])
    ids = {token["content"]: token["id"] for token in added if token["id"] not in ordinary}
    vocab = {name: i for name, i in spec["model"]["vocab"].items() if i not in ordinary}
    roles = {role: _name(config[role]) for role in ROLES if config.get(role)}
    end = next((name for name in (*ENDS, roles.get("eos_token")) if name in vocab | ids), None)
    if end is not None:  # as the last
        ids[end] = (ids | vocab)[end] if end not in ids else ids.pop(end)
    roles = {role: name for role, name in roles.items() if name in ids}
    ends = _answer_ends(folder, ids) + [roles[role] for role in ("eos_token",) if role in roles]
    starts = [name for name in _starts(spec) if name in ids]
    hidden = {end, *roles.values(), *starts, *ends}  # whatever their flags
    shown = (token["content"] for token in added if token.get("special") is False)
    template = _template(folder, config)
    if template is not None:
        _check_names(template, added)
    return SpecialTokens(
        ids,
        end,
        roles,
        starts,
        [name for name in dict.fromkeys(ends) if name != end],
        [name for name in shown if name in ids and name not in hidden],
        template,
    )


def _content(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _name(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _answer_ends(folder: Path, ids: dict[str, int]) -> list[str]:
    """Those that generation_config.json names."""
    ends = _content(folder / "generation_config.json").get("eos_token_id")
    wanted = ends if isinstance(ends, list) else [ends]
    return [name for name, i in ids.items() if i in wanted]


def _starts(spec: dict[str, Any]) -> list[str]:
    """Those that transformers puts before each text."""
    last = spec.get("post_processor") or {}
    names = []
    for step in last.get("processors", [last]):
        for piece in step["single"] if step.get("type") == "TemplateProcessing" else []:
            if "SpecialToken" not in piece:
                break
            names.append(piece["SpecialToken"]["id"])
    return names


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """The default one of several."""
    if (folder / TEMPLATE).is_file():
        source: Any = read_limited(folder / TEMPLATE, 4 * LONGEST).decode()
    else:
        source = config.get("chat_template")
    if isinstance(source, list):
        named = {template["name"]: template["template"] for template in source}
        source = named.get("default")
    if source is None:
        return None
    try:
        check_template(source)
    except ValueError as error:
        raise Unsupported(str(error)) from error
    return str(source)


def _check_names(template: str, added: list[dict[str, Any]]) -> None:
    for token in added:
        if token["content"] in template and any(token.get(flag) for flag in CHANGES_TEXT):
            flags = [flag for flag in CHANGES_TEXT if token.get(flag)]
            raise Unsupported(f"its chat template has {token['content']}, with {' '.join(flags)}")
