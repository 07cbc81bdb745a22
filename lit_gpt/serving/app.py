"""Owns the web application: its routes and limits, who may ask, what happens when a client leaves.

A page of another site can't use it: no CORS headers, its Origin is refused, and on the loopback
address so is a Host that another site's name was pointed at it for (DNS rebinding).

LitServe was tried first: in 0.2.19 its workers go on for a client that left, and outlive SIGTERM.
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
from lit_gpt.serving.batching import Batcher, Call, Failure, Refusal
from lit_gpt.serving.openai_api import Answer, ApiError, Body

MAX_BODY = 1 << 20  # bytes
GONE = Response(status_code=499)  # for the client that left: nobody reads it


@dataclass
class Service:
    """What the routes answer.

    Args:
        batcher: completes.
        model: as requests call it.
        created: when it was written, seconds since 1970.
        page: HTML.
        max_prompt_tokens: of one prompt.
        max_tokens: that a request may ask for.
    """

    batcher: Batcher
    model: str
    created: int
    page: str
    max_prompt_tokens: int
    max_tokens: int

    async def completions(self, request: Request) -> Response:
        body = Body.parse(await read_body(request))
        if body.model is not None:
            self._find_model(body.model)
        if body.max_tokens > self.max_tokens:
            raise ApiError(
                400,
                f"max_tokens: {body.max_tokens} are too many, this server writes at most "
                f"{self.max_tokens}",
                "max_tokens",
            )
        count, most = len(body.prompt) * body.n, self.batcher.max_concurrent
        if count > most:
            name = "n" if body.n > 1 else "prompt"
            message = f"{name}: {count} completions at a time are too many, at most {most}"
            raise ApiError(400, message, name)
        requests = body.requests()
        num_tokens = await asyncio.to_thread(self._count_tokens, body.prompt)
        try:
            call = self.batcher.submit(requests)
        except Refusal as refusal:
            raise ApiError(429, str(refusal), None, "too_many_requests", "requests") from refusal
        beginnings = [request.prompt if body.echo else "" for request in requests]
        answer = Answer(self.model, beginnings, num_tokens)
        if body.stream:
            return Stream(call, events(call, answer, body.stream_options.include_usage))
        return await whole(request, call, answer)

    def _count_tokens(self, prompts: list[str]) -> int:
        total = 0
        for prompt in prompts:
            total += (count := len(encode_prompt(self.batcher.tokenizer, prompt)))
            if count > self.max_prompt_tokens:
                raise ApiError(
                    400,
                    f"prompt: it has {count} tokens, at most {self.max_prompt_tokens} may be",
                    "prompt",
                    "context_length_exceeded",
                )
        return total

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._find_model(self.model)]})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(self._find_model(request.path_params["name"]))

    def _find_model(self, name: str) -> dict[str, Any]:
        if name != self.model:
            message = f"model: there is no {name!r} here, only {self.model!r}"
            raise ApiError(404, message, "model", "model_not_found")
        described = {"id": name, "object": "model", "created": self.created}
        return {**described, "owned_by": "lit_gpt"}

    async def health(self, request: Request) -> Response:
        running, waiting = self.batcher.counts()
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting})

    async def show_page(self, request: Request) -> Response:
        framed = "frame-ancestors 'none'"  # a policy that the page itself can't state
        return HTMLResponse(self.page, headers={"Content-Security-Policy": framed})


async def read_body(request: Request) -> bytes:
    """Raises:
    ApiError: it is larger than MAX_BODY.
    """
    body, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        body.append(chunk)
        if size > MAX_BODY:
            body.clear()  # yet it is read: many a client hears nothing while it sends
        if size > 64 * MAX_BODY:
            break
    if size > MAX_BODY:
        raise ApiError(413, f"The body has more than {MAX_BODY:,} bytes: send less at a time")
    return b"".join(body)


async def whole(request: Request, call: Call, answer: Answer) -> Response:
    """The answer in one piece."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        call.give_up()

    watching = asyncio.create_task(watch())
    try:
        async for piece in call.pieces():
            answer.add(piece)
    except Failure as failure:
        raise failed(failure) from failure
    finally:
        watching.cancel()
        call.give_up()
    return JSONResponse(answer.whole()) if answer.is_whole else GONE


async def events(call: Call, answer: Answer, with_usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    for index, text in enumerate(answer.texts):
        if text:
            yield event(answer.chunk(index, text))
    try:
        async for piece in call.pieces():
            answer.add(piece)
            if piece.text or piece.finish_reason:
                yield event(answer.chunk(piece.index, piece.text, piece.finish_reason))
    except Failure as failure:
        yield event(failed(failure).content)
        return
    if with_usage:
        yield event(answer.last_chunk())
    yield "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"  # in ASCII: some take U+2028 for a line's end


def failed(failure: Failure) -> ApiError:
    return ApiError(500, f"{failure}", kind="server_error")


class Stream(StreamingResponse):
    """Ends when the client leaves; the work for it, too."""

    def __init__(self, call: Call, content: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-store"}
        super().__init__(content, headers=headers, media_type="text/event-stream")
        self.call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.call.give_up()


class Gate:
    """Lets in whoever calls the server by one of its names, from no other site's page.

    Args:
        hosts: the names; None: any.
    """

    def __init__(self, app: ASGIApp, hosts: set[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (reason := self._refuses(Headers(scope=scope))):
            error = ApiError(403, reason, kind="permission_error")
            await JSONResponse(error.content, error.status)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refuses(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            if self.hosts is not None and urlsplit(f"//{host}").hostname not in self.hosts:
                return f"This server is not called {host!r} (--host opens it to other machines)"
            if origin is not None and urlsplit(origin).netloc != host:
                return f"Pages of {origin!r} may not use this server"
        except ValueError:
            return "Host or Origin can't be read"
        return None


def application(service: Service, hosts: set[str] | None) -> Starlette:
    """All routes; each error is in OpenAI's shape."""

    async def refuse(request: Request, error: ApiError) -> Response:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.content, error.status, headers)

    async def not_here(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path} is not served: {error.detail}"
        return JSONResponse(ApiError(0, message).content, error.status_code, error.headers)

    async def broken(request: Request, error: Exception) -> Response:
        message = f"{type(error).__name__}, see the server's messages"
        return JSONResponse(ApiError(0, message, kind="server_error").content, 500)

    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return GONE

    handlers = {
        ApiError: refuse,
        HTTPException: not_here,
        ClientDisconnect: gone,
        Exception: broken,
    }
    routes = [
        Route("/", service.show_page),
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.one_model),
        Route("/v1/completions", service.completions, methods=["POST"]),
    ]
    gate = Middleware(Gate, hosts=hosts)
    app = Starlette(routes=routes, middleware=[gate], exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


class Server(uvicorn.Server):
    """Says `line` once it listens; what is under way when it is stopped, fails at once."""

    def __init__(self, app: ASGIApp, batcher: Batcher, line: str) -> None:
        quiet = {"log_level": "error", "access_log": False}
        config = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", timeout_graceful_shutdown=2, **quiet
        )
        super().__init__(config)
        self.batcher, self.line = batcher, line
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # a client that left is no warning

    async def startup(self, *args: Any, **options: Any) -> None:
        await super().startup(*args, **options)
        print(self.line, flush=True)

    async def shutdown(self, *args: Any, **options: Any) -> None:
        self.batcher.stop()
        # Clients that don't read or send any more are cut off, and that is no error to be shown.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(*args, **options)
