"""Real servers, each a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import ROOT

CONTEXT = 64
LONG = 50_000  # tokens: a minute or more


class Server:
    """serve.py as a process."""

    def __init__(self, *argv: str, folder: Path) -> None:
        script = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--port=0"]
        self.process = subprocess.Popen(
            [*script, *argv],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.line = self.process.stdout.readline()
        assert self.line, self.process.stderr.read()
        self.url = self.line.split(" at ")[1].split()[0]
        self.port = int(self.url.rpartition(":")[2])

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def post(self, body: Any, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes | str) else json.dumps(body)
        return httpx.post(
            f"{self.url}/v1/completions", content=content, headers=headers, timeout=60
        )

    def counts(self) -> tuple[int, int]:
        health = httpx.get(f"{self.url}/health").json()
        assert health.pop("status") == "ok"
        return health["running"], health["waiting"]

    def wait_for(self, counts: tuple[int, int]) -> None:
        end = time.monotonic() + 20
        while self.counts() != counts:
            assert time.monotonic() < end, self.counts()
            time.sleep(0.02)

    def hang_up(self, body: dict[str, Any], window: int = 1 << 16) -> socket.socket:
        """Sends a request and returns the connection, for the caller to close."""
        content = json.dumps(body).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        connection.connect(("127.0.0.1", self.port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        return connection

    def stop(self, number: int) -> tuple[int, str]:
        """Stops the server, checks that no process is left, and returns exit status and stderr."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=60)
        with pytest.raises(ProcessLookupError):
            os.killpg(self.process.pid, 0)
        return self.process.returncode, err


@contextmanager
def serving(*argv: str, folder: Path) -> Iterator[Server]:
    server = Server(*argv, folder=folder)
    try:
        yield server
        if server.process.poll() is None:
            assert server.stop(signal.SIGTERM) == (143, "")
        assert list(folder.iterdir()) == []
    finally:
        server.process.kill()
