"""Responses of OpenAI's protocols, whole and streamed, from the pieces of completions.

They are plain dicts, because openai's own models would add half a second of imports and a
dependency; the tests check the responses against them.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from lit_gpt.generation.completion import CompletionChunk, Logprob
from lit_gpt.serving.openai_api import CompletionBody
from lit_gpt.text.tokenizer import Tokenizer


class TokenTexts:
    """How a response shows tokens.

    Part of a character is `bytes:\\xe7`, as at OpenAI, and a special token its name, so that no two
    tokens look the same.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.names = {i: name for name, i in tokenizer.special.items()}

    def __getitem__(self, token: int) -> str:
        if token in self.names:
            return self.names[token]
        data = self.tokenizer.tokens[token]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class LegacyLogprobs:
    """The log-probabilities of a choice's tokens, as the completions protocol has them."""

    def __init__(self, shown: TokenTexts) -> None:
        self.shown = shown
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.offset = 0  # of the next token in the choice's text, in characters

    def render(self, logprobs: Sequence[Logprob]) -> dict[str, list[Any]]:
        """The next tokens."""
        offsets = []
        for one in logprobs:
            offsets.append(self.offset)
            self.offset += len(self.decoder.decode(self.shown.tokenizer.tokens[one.token]))
        return {
            "tokens": [self.shown[one.token] for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [self._top(one) for one in logprobs],
            "text_offset": offsets,
        }

    def _top(self, one: Logprob) -> dict[str, float] | None:
        """The likeliest tokens, and always this one."""
        if one.logprob is None:
            return None
        pairs = [*one.likeliest, (one.token, one.logprob)]
        return {self.shown[token]: logprob for token, logprob in pairs}


class Response:
    """The response to a body, built from pieces as they come.

    Args:
        model: its name.
        count: the number of choices.
        prompt_tokens: of all prompts.
    """

    kind: str  # `object` of OpenAI; in a stream, of its chunks
    chunk_kind: str
    prefix: str  # of ids

    def __init__(self, model: str, count: int, prompt_tokens: int) -> None:
        self.texts = [""] * count
        self.logprobs: list[list[Logprob]] = [[] for _ in range(count)]
        self.finish_reasons: list[str | None] = [None] * count
        self.num_tokens = [0] * count
        self.prompt_tokens = prompt_tokens
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
        }

    def add(self, piece: CompletionChunk) -> None:
        self.texts[piece.index] += piece.text
        self.logprobs[piece.index] += self.shown_logprobs(piece)
        self.finish_reasons[piece.index] = piece.finish_reason
        self.num_tokens[piece.index] = piece.num_tokens

    def shown_logprobs(self, piece: CompletionChunk) -> Sequence[Logprob]:
        """Those of a piece that a client gets to see."""
        return piece.logprobs

    @property
    def is_finished(self) -> bool:
        return all(self.finish_reasons)

    def whole(self) -> dict[str, Any]:
        choices = [self.choice(index) for index in range(len(self.texts))]
        return {**self.head, "choices": choices, "usage": self._usage()}

    def choice(self, index: int) -> dict[str, Any]:
        """A finished choice."""
        raise NotImplementedError

    def opening(self) -> Iterator[dict[str, Any]]:
        """What a stream starts with."""
        raise NotImplementedError

    def parts(self, piece: CompletionChunk) -> Iterator[dict[str, Any]]:
        """What a piece is in a stream; the last has the reason why the choice ends."""
        raise NotImplementedError

    def chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_kind, "choices": list(choices), "usage": None}

    def usage_chunk(self) -> dict[str, Any]:
        """The end of a stream whose client asks for the usage."""
        return self.chunk() | {"usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        completion_tokens = sum(self.num_tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }


class CompletionResponse(Response):
    """The response of POST /v1/completions; arguments as for Response, and:

    Args:
        body: of the request.
        echoes: what the text of each choice starts with.
        hidden: how many tokens of each prompt are not of its text, but start it.
        shown: how tokens are shown.
    """

    kind = "text_completion"
    chunk_kind = kind
    prefix = "cmpl"

    def __init__(
        self,
        model: str,
        body: CompletionBody,
        echoes: list[str],
        hidden: list[int],
        prompt_tokens: int,
        shown: TokenTexts,
    ) -> None:
        super().__init__(model, len(echoes), prompt_tokens)
        self.body = body
        self.echoes = echoes
        self.hidden = hidden
        self.shown = shown
        self.streamed = [LegacyLogprobs(shown) for _ in echoes]

    def choice(self, index: int) -> dict[str, Any]:
        logprobs = LegacyLogprobs(self.shown).render(self.logprobs[index])
        text = self.echoes[index] + self.texts[index]
        return self._choice(index, text, logprobs, self.finish_reasons[index])

    def opening(self) -> Iterator[dict[str, Any]]:
        if not self.body.scores_prompt:  # else the first piece brings its log-probabilities
            for index, echo in enumerate(self.echoes):
                if echo:
                    nothing = self.streamed[index].render([])
                    yield self.chunk(self._choice(index, echo, nothing, None))

    def shown_logprobs(self, piece: CompletionChunk) -> Sequence[Logprob]:
        return piece.logprobs[self.hidden[piece.index] if piece.num_tokens == 0 else 0 :]

    def parts(self, piece: CompletionChunk) -> Iterator[dict[str, Any]]:
        text = self.echoes[piece.index] if piece.num_tokens == 0 else piece.text
        if text or piece.finish_reason or piece.logprobs:
            logprobs = self.streamed[piece.index].render(self.shown_logprobs(piece))
            yield self.chunk(self._choice(piece.index, text, logprobs, piece.finish_reason))

    def _choice(
        self, index: int, text: str, logprobs: dict[str, list[Any]], finish_reason: str | None
    ) -> dict[str, Any]:
        shown = None if self.body.logprobs is None else logprobs
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": finish_reason}
