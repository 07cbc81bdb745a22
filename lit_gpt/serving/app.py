"""The web application: routes and limits; `access` says who may use it.

Not LitServe: the workers of 0.2.19 keep computing for a client that has disconnected, and survive
SIGTERM.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from lit_gpt.errors import UserError
from lit_gpt.generation import completion
from lit_gpt.generation.completion import encode_prompt
from lit_gpt.serving.access import KeyGuard, OriginGuard
from lit_gpt.serving.batching import Batcher, Busy
from lit_gpt.serving.chat_api import ChatBody, ChatResponse
from lit_gpt.serving.openai_api import (
    ApiError,
    CompletionBody,
    GenerationBody,
    invalid,
)
from lit_gpt.serving.responses import CompletionResponse, TokenTexts
from lit_gpt.serving.responses import Response as ApiResponse
from lit_gpt.serving.streaming import (
    DISCONNECTED,
    EventStream,
    complete_response,
    events,
    read_body,
)
from lit_gpt.text.chat import ChatTemplate


@dataclass
class Service:
    """The handlers of all routes.

    Args:
        batcher: completes the requests.
        model: its name in requests.
        created: when the checkpoint was written, seconds since 1970.
        page: HTML.
        max_prompt_tokens: of one prompt.
        max_tokens: the most that a request may ask for.
        context_length: of the model, in tokens.
    """

    batcher: Batcher
    model: str
    created: int
    page: str
    max_prompt_tokens: int
    max_tokens: int
    context_length: int

    def __post_init__(self) -> None:
        self.tokenizer = self.batcher.tokenizer
        self.template = ChatTemplate.of(self.tokenizer)
        self.shown = TokenTexts(self.tokenizer)

    async def completions(self, request: Request) -> Response:
        body = CompletionBody.parse(await read_body(request))
        self._check(body, "max_tokens", body.max_tokens, len(body.prompt))
        prompts = await asyncio.to_thread(self._encode, body)
        requests = body.requests(
            prompts,
            max_new_tokens=body.max_tokens,
            logprobs=body.logprobs,
            scores_prompt=body.scores_prompt,
        )
        texts = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in body.prompt]
        echoes = [text if body.echo else "" for text in texts for _ in range(body.n)]
        hidden = [self._num_hidden(prompt) for prompt in body.prompt for _ in range(body.n)]
        num_tokens = sum(map(len, prompts))
        response = CompletionResponse(self.model, body, echoes, hidden, num_tokens, self.shown)
        return await self._respond(request, body, requests, response)

    async def chat(self, request: Request) -> Response:
        body = ChatBody.parse(await read_body(request))
        name, limit = body.limit
        self._check(body, name, limit, 1)
        prompt = await asyncio.to_thread(self._encode_chat, body)
        if limit is None:  # as far as the model still sees the question
            limit = max(1, min(self.max_tokens, self.context_length - len(prompt)))
        requests = body.requests(
            [prompt],
            max_new_tokens=limit,
            logprobs=body.num_logprobs,
            stop=(*body.stop, *self.template.stop),
        )
        response = ChatResponse(self.model, body, len(prompt), self.shown)
        return await self._respond(request, body, requests, response)

    def _check(self, body: GenerationBody, name: str, limit: int | None, num_prompts: int) -> None:
        """Refuses another model, too many tokens (the parameter `name`) and too many choices."""
        if body.model is not None:
            self._find_model(body.model)
        if limit is not None and limit > self.max_tokens:
            raise invalid(name, f"must be at most {self.max_tokens}, not {limit}")
        count = num_prompts * body.n
        most = self.batcher.max_concurrent
        if count > most:
            problem = f"asks for {count} completions, at most {most} can run at a time"
            raise invalid("n" if body.n > 1 else "prompt", problem)

    def _encode(self, body: CompletionBody) -> list[list[int]]:
        """The ids of all prompts.

        Raises:
            ApiError: a prompt is too long, or has an id or a byte that the model lacks.
        """
        most = self.max_prompt_tokens
        if body.scores_prompt:  # the last token of a scored prompt is predicted, but not read
            most = min(most, self.context_length) + 1
        prompts = []
        for prompt in body.prompt:
            try:
                ids = encode_prompt(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
            except UserError as error:
                raise invalid("prompt", str(error)) from error
            prompts.append(self._checked(ids, "prompt", most))
        return prompts

    def _num_hidden(self, prompt: str | list[int]) -> int:
        """How many of a prompt's tokens the model needs to start, but its text does not have."""
        if not isinstance(prompt, str):
            return 0
        return len(self.tokenizer.start_names if prompt else encode_prompt(self.tokenizer, ""))

    def _encode_chat(self, body: ChatBody) -> list[int]:
        """The ids of a conversation up to the answer.

        Raises:
            ApiError: the template refuses it, it is too long, or has a byte without a token.
        """
        try:
            text = self.template.render(body.conversation(), add_generation_prompt=True)
            ids = self.tokenizer.encode_chat(text).tolist()
        except UserError as error:
            raise invalid("messages", str(error)) from error
        return self._checked(ids, "messages", self.max_prompt_tokens)

    def _checked(self, ids: list[int], param: str, most: int) -> list[int]:
        """The ids, unless there are too many or the model lacks one."""
        if len(ids) > most:
            problem = f"has {len(ids)} tokens, at most {most} are allowed"
            raise invalid(param, problem, "context_length_exceeded")
        size = self.tokenizer.vocab_size
        for i in ids:
            if not 0 <= i < size:
                raise invalid(param, f"token id {i} must be in [0, {size})")
        return ids

    async def _respond(
        self,
        request: Request,
        body: GenerationBody,
        requests: list[completion.Request],
        response: ApiResponse,
    ) -> Response:
        """Submits the requests, and streams or awaits the response."""
        try:
            job = self.batcher.submit(requests)
        except Busy as busy:
            retry = {"Retry-After": "1"}  # seconds
            raise ApiError(
                429, str(busy), code="too_many_requests", kind="requests", headers=retry
            ) from busy
        if body.stream:
            return EventStream(job, events(job, response, body.stream_options.include_usage))
        return await complete_response(request, job, response)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._find_model(self.model)]})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(self._find_model(request.path_params["name"]))

    def _find_model(self, name: str) -> dict[str, Any]:
        if name != self.model:
            message = f"model: {name!r} not found, this server has {self.model!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return {"id": name, "object": "model", "created": self.created, "owned_by": "lit_gpt"}

    async def health(self, request: Request) -> Response:
        running, waiting = self.batcher.counts()
        is_alive = self.batcher.is_alive()
        content = {"status": "ok" if is_alive else "stopped", "running": running}
        return JSONResponse(content | {"waiting": waiting}, 200 if is_alive else 503)

    async def show_page(self, request: Request) -> Response:
        policy = "frame-ancestors 'none'"  # has no effect in a <meta> element
        return HTMLResponse(self.page, headers={"Content-Security-Policy": policy})


def application(service: Service, hosts: set[str] | None, key: str | None = None) -> Starlette:
    """All routes, with every error in OpenAI's shape.

    Args:
        service: the handlers.
        hosts: as for OriginGuard.
        key: as for KeyGuard; None: whoever reaches the server may use it.
    """

    async def http_error(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):
            message = f"{request.method} {request.url.path}: {error.detail}"
            error = ApiError(error.status_code, message, headers=error.headers)
        return JSONResponse(error.content, error.status_code, error.headers)

    async def internal_error(request: Request, error: Exception) -> Response:
        message = f"{type(error).__name__}, see the server's log"
        return await http_error(request, ApiError(500, message, kind="server_error"))

    async def disconnected(request: Request, error: ClientDisconnect) -> Response:
        return DISCONNECTED

    handlers: dict[Any, Any] = {
        HTTPException: http_error,
        ClientDisconnect: disconnected,
        Exception: internal_error,
    }
    routes = [
        Route("/", service.show_page),
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.one_model),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
    ]
    guards = [Middleware(OriginGuard, hosts=hosts)]
    if key is not None:
        guards.append(Middleware(KeyGuard, key=key))
    app = Starlette(routes=routes, middleware=guards, exception_handlers=handlers)
    app.router.redirect_slashes = False  # /health/ is not found
    return app


class Server(uvicorn.Server):
    """Prints `line` once it listens; when stopped, makes unfinished requests fail at once."""

    def __init__(self, app: ASGIApp, batcher: Batcher, line: str) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            timeout_graceful_shutdown=2,
            log_level="error",
            access_log=False,
        )
        super().__init__(config)
        self.batcher = batcher
        self.line = line
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # hides clients that disconnect

    async def startup(self, *args: Any, **options: Any) -> None:
        await super().startup(*args, **options)
        print(self.line, flush=True)

    async def shutdown(self, *args: Any, **options: Any) -> None:
        self.batcher.stop()
        # Hides that clients which neither read nor send are cut off.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(*args, **options)
