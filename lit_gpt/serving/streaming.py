"""Bodies in, whole or streamed responses out, and clients that disconnect on the way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lit_gpt.serving import responses
from lit_gpt.serving.batching import Failure, Job
from lit_gpt.serving.openai_api import ApiError

MAX_BODY = 1 << 20  # bytes
DISCONNECTED = Response(status_code=499)  # for a client that is gone, so never sent


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


async def complete_response(request: Request, job: Job, response: responses.Response) -> Response:
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


async def events(job: Job, response: responses.Response, with_usage: bool) -> AsyncIterator[str]:
    """Yields the response as server-sent events."""
    for chunk in response.opening():
        yield event(chunk)
    try:
        async for piece in job.pieces():
            response.add(piece)
            for chunk in response.parts(piece):
                yield event(chunk)
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
