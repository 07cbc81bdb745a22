"""Owns OpenAI's completions protocol: a body of JSON -> requests, pieces -> JSON, errors.

https://platform.openai.com/docs/api-reference/completions. What it has and this server has not is
refused, never ignored. Ours beyond it: top_k, min_p, repetition_penalty.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import fields
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lit_gpt.errors import UserError
from lit_gpt.generation.completion import Piece, Request
from lit_gpt.generation.sampling import Sampling

WITHOUT_EFFECT = {  # values of what is not supported that change nothing
    "suffix": "",
    "logprobs": None,
    "best_of": 1,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
MOST = 2048  # prompts of a body, as OpenAI has it
IN_WORDS = {"missing": "is required", "extra_forbidden": "is no parameter of this server"}


def parameter_name(field: str) -> str:
    """A field of Request or Sampling as OpenAI's API spells it."""
    return "max_tokens" if field == "max_new_tokens" else field


class ApiError(Exception):
    """What is answered instead, in OpenAI's shape; `param` names the parameter to mend."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.content = {"error": error}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = False


class Body(BaseModel):
    """What a client sends. A null is as if it were left out."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: list[str] = Field(min_length=1)
    model: str | None = None
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    n: int = Field(1, ge=1, le=128)
    seed: int | None = None
    stop: list[str] = Field([], max_length=4)
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None  # says who asks, and changes nothing
    suffix: Any = None
    logprobs: Any = None
    best_of: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}

    @field_validator("prompt", "stop", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) > MOST:
            raise ValueError(f"has {len(value)} texts, at most {MOST} may be")
        if isinstance(value, list) and any(isinstance(part, int | list) for part in value):
            raise ValueError("must be text: token ids are not supported")
        return [value] if isinstance(value, str) else value

    @field_validator(*WITHOUT_EFFECT)
    @classmethod
    def _not_supported(cls, value: Any, info: Any) -> Any:
        if value != WITHOUT_EFFECT[info.field_name]:
            raise ValueError("is not supported by this server: leave it out")
        return value

    @classmethod
    def parse(cls, raw: bytes) -> Body:
        """Raises:
        ApiError: no JSON, or values that are not to be.
        """
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            raise _refused(error) from error

    def requests(self) -> list[Request]:
        """n for each prompt; the first draws with the seed, the next with the next ones.

        Raises:
            ApiError: values out of range.
        """
        given = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        try:
            sampling = Sampling(**{k: value for k, value in given.items() if value is not None})
            return [
                Request(prompt, self.max_tokens, sampling, seed, tuple(self.stop))
                for prompt in self.prompt
                for seed in self._seeds()
            ]
        except UserError as error:
            param = None if error.field is None else parameter_name(error.field)
            raise ApiError(400, error.render(parameter_name), param) from error

    def _seeds(self) -> list[int]:
        if self.seed is None:
            return [secrets.randbelow(2**63) for _ in range(self.n)]
        return [self.seed + i for i in range(self.n)]


def _refused(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return ApiError(400, f"The body is no JSON object that can be read: {first['msg']}")
    names = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]]
    name = "".join(names).removeprefix(".")
    words = first["msg"].removeprefix("Value error, ")
    words = IN_WORDS.get(first["type"], words[0].lower() + words[1:].replace("Input", "input"))
    return ApiError(400, f"{name}: {words}", str(first["loc"][0]))


class Answer:
    """What is answered to a body, as its pieces come.

    Args:
        model: as it is called.
        beginnings: of the text of each choice.
        prompt_tokens: of all prompts.
    """

    def __init__(self, model: str, beginnings: list[str], prompt_tokens: int) -> None:
        self.texts, self.prompt_tokens = beginnings, prompt_tokens
        self.reasons: list[str | None] = [None] * len(beginnings)
        self.num_tokens = [0] * len(beginnings)
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def add(self, piece: Piece) -> None:
        self.texts[piece.index] += piece.text
        self.reasons[piece.index] = piece.finish_reason
        self.num_tokens[piece.index] = piece.num_tokens

    @property
    def is_whole(self) -> bool:
        return all(self.reasons)

    def whole(self) -> dict[str, Any]:
        choices = enumerate(zip(self.texts, self.reasons, strict=True))
        choices = [_choice(index, text, reason) for index, (text, reason) in choices]
        return {**self.head, "choices": choices, "usage": self.usage()}

    def chunk(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        """A part of a choice's text; the reason it ends for, with the last part."""
        return {**self.head, "choices": [_choice(index, text, reason)], "usage": None}

    def last_chunk(self) -> dict[str, Any]:
        """After all text: the usage."""
        return {**self.head, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        written = sum(self.num_tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
