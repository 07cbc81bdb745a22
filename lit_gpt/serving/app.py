"""The web application: routes, limits, who may use it, and clients that disconnect.

Pages of other sites can't use it: there are no CORS headers, a foreign Origin is refused, and on
the loopback address so is a foreign Host, which DNS rebinding would send.

Not LitServe: the workers of 0.2.19 keep computing for a client that has disconnected, and survive
SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lit_gpt.generation.completion import encode_prompt
from lit_gpt.serving.batching import Batcher, Busy, Failure, Job
from lit_gpt.serving.openai_api import ApiError, CompletionBody, CompletionResponse, invalid

MAX_BODY = 1 << 20  # bytes
DISCONNECTED = Response(status_code=499)  # for a client that is gone, so never sent


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
    """

    batcher: Batcher
    model: str
    created: int
    page: str
    max_prompt_tokens: int
    max_tokens: int

    async def completions(self, request: Request) -> Response:
        body = CompletionBody.parse(await read_body(request))
        if body.model is not None:
            self._find_model(body.model)
        if body.max_tokens > self.max_tokens:
            raise invalid("max_tokens", f"must be at most {self.max_tokens}, not {body.max_tokens}")
        count = len(body.prompt) * body.n
        most = self.batcher.max_concurrent
        if count > most:
            problem = f"asks for {count} completions, at most {most} can run at a time"
            raise invalid("n" if body.n > 1 else "prompt", problem)
        requests = body.requests()
        num_tokens = await asyncio.to_thread(self._count_tokens, body.prompt)
        try:
            job = self.batcher.submit(requests)
        except Busy as busy:
            retry = {"Retry-After": "1"}  # seconds
            raise ApiError(
                429, str(busy), code="too_many_requests", kind="requests", headers=retry
            ) from busy
        echoes = [request.prompt if body.echo else "" for request in requests]
        response = CompletionResponse(self.model, echoes, num_tokens)
        if body.stream:
            return EventStream(job, events(job, response, body.stream_options.include_usage))
        return await complete_response(request, job, response)

    def _count_tokens(self, prompts: list[str]) -> int:
        """The number of tokens of all prompts.

        Raises:
            ApiError: a prompt is too long.
        """
        total = 0
        for prompt in prompts:
            count = len(encode_prompt(self.batcher.tokenizer, prompt))
            if count > self.max_prompt_tokens:
                problem = f"has {count} tokens, at most {self.max_prompt_tokens} are allowed"
                raise invalid("prompt", problem, "context_length_exceeded")
            total += count
        return total

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
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting})

    async def show_page(self, request: Request) -> Response:
        policy = "frame-ancestors 'none'"  # has no effect in a <meta> element
        return HTMLResponse(self.page, headers={"Content-Security-Policy": policy})


async def read_body(request: Request) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is larger than MAX_BODY.
    """
    body = b""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_BODY:
            body += chunk
        elif size > 64 * MAX_BODY:  # until then keep reading: many clients send before they read
            break
    if size > MAX_BODY:
        raise ApiError(413, f"The body has more than {MAX_BODY:,} bytes")
    return body


async def complete_response(request: Request, job: Job, response: CompletionResponse) -> Response:
    """Waits for the whole response, or until the client disconnects."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watching = asyncio.create_task(watch())
    try:
        async for piece in job.pieces():
            response.add(piece)
    except Failure as failure:
        raise ApiError(500, str(failure), kind="server_error") from failure
    finally:
        watching.cancel()
        job.cancel()
    return JSONResponse(response.whole()) if response.is_finished else DISCONNECTED


async def events(job: Job, response: CompletionResponse, with_usage: bool) -> AsyncIterator[str]:
    """Yields the response as server-sent events."""
    for index, echo in enumerate(response.texts):
        if echo:
            yield event(response.chunk(index, echo))
    try:
        async for piece in job.pieces():
            response.add(piece)
            if piece.text or piece.finish_reason:
                yield event(response.chunk(piece.index, piece.text, piece.finish_reason))
    except Failure as failure:
        yield event(ApiError(500, str(failure), kind="server_error").content)
        return
    if with_usage:
        yield event(response.usage_chunk())
    yield "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"  # ASCII: some clients take U+2028 for a line end


class EventStream(StreamingResponse):
    """Server-sent events; the job is cancelled when the client disconnects."""

    def __init__(self, job: Job, content: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-store"}
        super().__init__(content, headers=headers, media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


class OriginGuard:
    """Middleware that refuses requests from pages of other sites, and under other host names.

    Args:
        hosts: the server's names; None: any.
    """

    def __init__(self, app: ASGIApp, hosts: set[str] | None) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self._problem(Headers(scope=scope))):
            error = ApiError(403, problem, kind="permission_error")
            await JSONResponse(error.content, error.status_code)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _problem(self, headers: Headers) -> str | None:
        host = headers.get("host", "")
        origin = headers.get("origin")
        try:
            if self.hosts is not None and urlsplit(f"//{host}").hostname not in self.hosts:
                return f"Host {host!r} is not allowed"
            if origin is not None and urlsplit(origin).netloc != host:
                return f"Pages of {origin!r} may not use this server"
        except ValueError:
            return "Invalid Host or Origin"
        return None


def application(service: Service, hosts: set[str] | None) -> Starlette:
    """All routes, with every error in OpenAI's shape; `hosts` as for OriginGuard."""

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
    ]
    guard = Middleware(OriginGuard, hosts=hosts)
    app = Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)
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
