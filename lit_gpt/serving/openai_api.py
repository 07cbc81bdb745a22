"""OpenAI's completions protocol: from a JSON body to requests; `responses` has the way back.

https://platform.openai.com/docs/api-reference/completions. Whatever is not supported is refused,
never ignored. top_k, min_p and repetition_penalty are additions. `chat_api` has the other protocol.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
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
from typing_extensions import Self

from lit_gpt.errors import UserError
from lit_gpt.generation.completion import Request
from lit_gpt.generation.sampling import Sampling

MAX_PROMPTS = 2048  # OpenAI's limit
MAX_STOPS = 16  # OpenAI's limit is 4, but tasks of lm-evaluation-harness have more


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


def only(default: Any, *others: Any) -> Any:
    """A parameter that is not supported: it takes no values but these, which change nothing."""
    return Field(default, json_schema_extra={"accepted": [default, *others]})


class Body(BaseModel):
    """JSON from a client; a null counts as left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}

    @field_validator("*")
    @classmethod
    def _only_accepted(cls, value: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[info.field_name or ""].json_schema_extra
        if isinstance(extra, dict) and value not in extra["accepted"]:  # type: ignore[operator]
            raise PydanticCustomError("unsupported", "Not supported by this server: leave it out")
        return value


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # there is none: a server of one's own has no need to hide


class GenerationBody(Body):
    """What the bodies of completions and of chats share."""

    model: str | None = None
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    n: int = Field(1, ge=1, le=128)
    seed: int | None = None
    stop: list[str] = Field([], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None  # identifies the end user, and changes nothing
    logit_bias: Any = only({})

    @field_validator("stop", mode="before")
    @classmethod
    def _to_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @classmethod
    def parse(cls, raw: bytes) -> Self:
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

    def requests(self, prompts: Sequence[Sequence[int]], **details: Any) -> list[Request]:
        """n for each prompt; the first draws with `seed`, the others with the seeds after it.

        Args:
            prompts: their ids.
            details: other arguments of each Request.

        Raises:
            ApiError: a value out of range.
        """
        options = self.model_dump(include={f.name for f in fields(Sampling)}, exclude_none=True)
        details = {"stop": tuple(self.stop), **details}
        try:
            sampling = Sampling(**options)
            return [
                Request(
                    ids=tuple(prompt),
                    sampling=sampling,
                    seed=secrets.randbelow(2**63) if self.seed is None else self.seed + i,
                    **details,
                )
                for prompt in prompts
                for i in range(self.n)
            ]
        except UserError as error:
            param = error.field and parameter_name(error.field)
            raise ApiError(400, error.render(parameter_name), param) from error


class CompletionBody(GenerationBody):
    """The body of POST /v1/completions; a prompt is a text or token ids."""

    prompt: list[str] | list[list[int]]
    max_tokens: int = 16
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)
    suffix: Any = only("")
    best_of: Any = only(1)

    @field_validator("prompt", mode="before")
    @classmethod
    def _to_prompts(cls, value: Any) -> Any:
        prompts = [value] if isinstance(value, str) or _are_ids(value) else value
        if not isinstance(prompts, list) or not (
            all(isinstance(prompt, str) for prompt in prompts) or all(map(_are_ids, prompts))
        ):
            problem = "Input should be a valid text, token ids, or a list of texts or of token ids"
            raise PydanticCustomError("prompt", problem)
        if not prompts or [] in prompts:
            raise PydanticCustomError("too_short", "List should have at least 1 item")
        if len(prompts) > MAX_PROMPTS:
            raise PydanticCustomError("too_long", "List should have at most 2048 prompts")
        return prompts

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens are scored, or nothing is generated."""
        return self.echo and (self.logprobs is not None or self.max_tokens == 0)


def _are_ids(value: Any) -> bool:
    """Whether it is a list of integers; an empty one counts as no list of prompts either."""
    return isinstance(value, list) and all(type(part) is int for part in value)
