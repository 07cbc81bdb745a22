"""OpenAI's chat protocol, which most clients speak: from messages to requests, pieces to JSON.

https://platform.openai.com/docs/api-reference/chat. Texts only; tools, formats, images and whatever
else is not supported are refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from lit_gpt.generation.completion import CompletionChunk, Logprob
from lit_gpt.serving.openai_api import Body, GenerationBody, invalid, only
from lit_gpt.serving.responses import Response, TokenTexts
from lit_gpt.text.chat import Message


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    type: Any = only("text")  # which lm-evaluation-harness has sent
    tool_calls: Any = only([])

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        """Parts of text as lines of one, which vLLM and llama.cpp make of them too."""
        if not isinstance(value, list):
            return value
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in value
        ]
        if not texts or not all(isinstance(text, str) for text in texts):
            problem = "Must be a text or a list of text parts: this server reads nothing else"
            raise PydanticCustomError("content", problem)
        return "\n".join(map(str, texts))


class ChatBody(GenerationBody):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)  # what older clients call the next
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Any = only([])
    tool_choice: Any = only("none", "auto")
    functions: Any = only([])
    response_format: Any = only(None, {"type": "text"})
    modalities: Any = only(None, ["text"])
    store: Any = only(False)
    service_tier: Any = only("auto", "default")

    @property
    def limit(self) -> tuple[str, int | None]:
        """The name and the value of the limit of new tokens; None: there is none.

        Raises:
            ApiError: there are two.
        """
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise invalid("max_tokens", "is the older name of max_completion_tokens: give one")
        if self.max_tokens is not None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to show beside each; None: not even that one.

        Raises:
            ApiError: it is given, but log-probabilities are not asked for.
        """
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs is not None:
            raise invalid("top_logprobs", "needs logprobs to be true")
        return None

    def conversation(self) -> list[Message]:
        """The messages for a template; a developer is what others call the system."""
        return [
            {"role": "system" if m.role == "developer" else m.role, "content": m.content}
            for m in self.messages
        ]


class ChatResponse(Response):
    """The response of POST /v1/chat/completions; arguments as for Response, and:

    Args:
        body: of the request.
        shown: how tokens are shown.
    """

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, model: str, body: ChatBody, prompt_tokens: int, shown: TokenTexts) -> None:
        super().__init__(model, body.n, prompt_tokens)
        self.body = body
        self.shown = shown

    def choice(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": self.texts[index], "refusal": None},
            "logprobs": self._logprobs(self.logprobs[index]),
            "finish_reason": self.finish_reasons[index],
        }

    def opening(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self.texts)):
            yield self._delta(index, {"role": "assistant", "content": "", "refusal": None})

    def parts(self, piece: CompletionChunk) -> Iterator[dict[str, Any]]:
        logprobs = self._logprobs(piece.logprobs)
        if piece.text or (logprobs and logprobs["content"]):
            yield self._delta(piece.index, {"content": piece.text}, logprobs)
        if piece.finish_reason:
            yield self._delta(piece.index, {}, None, piece.finish_reason)

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        return self.chunk(
            {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        )

    def _logprobs(self, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        ends = self.shown.tokenizer.end_ids  # which end the answer, and are not part of it
        content = [
            self._shown(one.token, one.logprob)
            | {"top_logprobs": [self._shown(*pair) for pair in one.likeliest]}
            for one in logprobs
            if one.token not in ends
        ]
        return {"content": content, "refusal": None}

    def _shown(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = list(self.shown.tokenizer.tokens[token])
        return {"token": self.shown[token], "logprob": logprob, "bytes": data}
