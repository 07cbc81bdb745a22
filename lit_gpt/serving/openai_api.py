"""OpenAI's completions protocol: from a JSON body to requests, and from pieces to JSON.

https://platform.openai.com/docs/api-reference/completions. Whatever is not supported is refused,
never ignored. top_k, min_p and repetition_penalty are additions.

The responses are plain dicts, because openai's own models would add half a second of imports and
a dependency; the tests check the responses against them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from lit_gpt.errors import UserError
from lit_gpt.generation.completion import CompletionChunk, Request
from lit_gpt.generation.sampling import Sampling

MAX_PROMPTS = 2048  # OpenAI's limit


class ApiError(HTTPException):
    """An error in OpenAI's shape.

    Args:
        status: of HTTP.
        message: for people.
        param: the parameter at fault.
        code: for programs.
        kind: OpenAI's `type`.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.content = {"error": error}


def invalid(param: str, problem: str, code: str | None = None) -> ApiError:
    """A parameter's value can't be used."""
    return ApiError(400, f"{param}: {problem}", param, code)


def parameter_name(field: str) -> str:
    """A field of Request or Sampling as the API spells it."""
    return "max_tokens" if field == "max_new_tokens" else field


class Body(BaseModel):
    """JSON from a client; a null counts as left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(Body):
    include_usage: bool = False


class CompletionBody(Body):
    """The body of POST /v1/completions."""

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
    user: str | None = None  # identifies the end user, and changes nothing
    # Not supported: only the defaults, which change nothing, are accepted.
    suffix: Any = ""
    logprobs: Any = None
    best_of: Any = 1
    logit_bias: Any = {}
    presence_penalty: Any = 0
    frequency_penalty: Any = 0

    @field_validator("prompt", "stop", mode="before")
    @classmethod
    def _to_list(cls, value: Any) -> Any:
        if isinstance(value, list):
            if len(value) > MAX_PROMPTS:
                raise PydanticCustomError("too_long", "List should have at most 2048 texts")
            if any(isinstance(part, int | list) for part in value):
                raise PydanticCustomError("token_ids", "Must be text: token ids are not supported")
        return [value] if isinstance(value, str) else value

    @field_validator(
        "suffix", "logprobs", "best_of", "logit_bias", "presence_penalty", "frequency_penalty"
    )
    @classmethod
    def _refuse_unsupported(cls, value: Any, info: ValidationInfo) -> Any:
        if value != cls.model_fields[info.field_name or ""].default:
            raise PydanticCustomError("unsupported", "Not supported by this server: leave it out")
        return value

    @classmethod
    def parse(cls, raw: bytes) -> CompletionBody:
        """Parses a body.

        Raises:
            ApiError: invalid JSON or values.
        """
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        if not first["loc"]:
            raise ApiError(400, f"The body must be a JSON object: {first['msg']}")
        names = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]]
        message = f"{''.join(names).removeprefix('.')}: {first['msg']}"
        raise ApiError(400, message, str(first["loc"][0]))

    def requests(self) -> list[Request]:
        """n for each prompt; the first draws with `seed`, the others with the seeds after it.

        Raises:
            ApiError: a value out of range.
        """
        options = self.model_dump(include={f.name for f in fields(Sampling)}, exclude_none=True)
        try:
            sampling = Sampling(**options)
            return [
                Request(
                    prompt,
                    self.max_tokens,
                    sampling,
                    secrets.randbelow(2**63) if self.seed is None else self.seed + i,
                    tuple(self.stop),
                )
                for prompt in self.prompt
                for i in range(self.n)
            ]
        except UserError as error:
            param = error.field and parameter_name(error.field)
            raise ApiError(400, error.render(parameter_name), param) from error


class CompletionResponse:
    """The response to a body, built from pieces as they come.

    Args:
        model: its name.
        echoes: what the text of each choice starts with.
        prompt_tokens: of all prompts.
    """

    def __init__(self, model: str, echoes: list[str], prompt_tokens: int) -> None:
        self.texts = echoes
        self.prompt_tokens = prompt_tokens
        self.finish_reasons: list[str | None] = [None] * len(echoes)
        self.num_tokens = [0] * len(echoes)
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def add(self, piece: CompletionChunk) -> None:
        self.texts[piece.index] += piece.text
        self.finish_reasons[piece.index] = piece.finish_reason
        self.num_tokens[piece.index] = piece.num_tokens

    @property
    def is_finished(self) -> bool:
        return all(self.finish_reasons)

    def whole(self) -> dict[str, Any]:
        results = zip(self.texts, self.finish_reasons, strict=True)
        choices = [_choice(index, *result) for index, result in enumerate(results)]
        return {**self.head, "choices": choices, "usage": self._usage()}

    def chunk(self, index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        """A part of a choice's text; the last part has the reason why it ends."""
        return {**self.head, "choices": [_choice(index, text, finish_reason)], "usage": None}

    def usage_chunk(self) -> dict[str, Any]:
        """The end of a stream whose client asks for the usage."""
        return {**self.head, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        completion_tokens = sum(self.num_tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }


def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
