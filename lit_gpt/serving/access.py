"""Who may use the server.

Pages of other sites can't: there are no CORS headers, a foreign Origin is refused, and on the
loopback address so is a foreign Host, which DNS rebinding would send. With a key, only requests
that bring it can use the model.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lit_gpt.serving.openai_api import ApiError


class Guard:
    """Middleware that answers some requests with an error, before anything else sees them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self.error(scope) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            response = JSONResponse(error.content, error.status_code, error.headers)
            await response(scope, receive, send)

    def error(self, scope: Scope) -> ApiError | None:
        """Why a request is refused; None: it is not."""
        raise NotImplementedError


class OriginGuard(Guard):
    """Refuses requests from pages of other sites, and under other host names.

    Args:
        hosts: the server's names; None: any.
    """

    def __init__(self, app: ASGIApp, hosts: set[str] | None) -> None:
        super().__init__(app)
        self.hosts = hosts

    def error(self, scope: Scope) -> ApiError | None:
        problem = self._problem(Headers(scope=scope))
        return ApiError(403, problem, kind="permission_error") if problem else None

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


class KeyGuard(Guard):
    """Refuses requests without the key, which OpenAI's clients send as `Authorization: Bearer KEY`.

    The page and /health need none: they tell the model's name and size, and how busy it is.

    Args:
        key: printable ASCII.
    """

    OPEN = ("/", "/health")

    def __init__(self, app: ASGIApp, key: str) -> None:
        super().__init__(app)
        self.key = key.encode()

    def error(self, scope: Scope) -> ApiError | None:
        if scope["path"] in self.OPEN:
            return None
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, key = given.partition(" ")
        if scheme.lower() == "bearer" and self._is_right(key.strip()):
            return None
        problem = "Incorrect API key" if given else "This server needs an API key"
        return ApiError(
            401,
            f"{problem}: send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _is_right(self, key: str) -> bool:
        """Compares in a time that does not tell how much of the key is right."""
        return hmac.compare_digest(key.encode("latin-1"), self.key)
