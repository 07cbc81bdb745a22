"""An S3 server as a process of its own, and a proxy before it that counts and breaks answers."""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENVIRONMENT = {  # of a client
    "AWS_ALLOW_HTTP": "true",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "NO_PROXY": "127.0.0.1",
}
Fault = Callable[[str, str], str | None]  # method and object to what goes wrong


class Proxy:
    """Passes requests on to a server.

    Attributes:
        fault: what to do with a request: `break` off the answer in the middle, `damage` a byte of
            it, wait (`slow`), or answer with a status such as `503`; None: pass it on.
        counts: requests by method and object.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.fault: Fault = lambda method, name: None
        self.counts: Counter[tuple[str, str]] = Counter()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def clear(self) -> None:
        self.fault = lambda method, name: None
        self.counts.clear()


def handler_of(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with suppress(ConnectionError):  # of a client that has given up
                super().handle()

        def log_message(self, *_: object) -> None:
            pass

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            name = re.sub(r"\?.*", "", self.path).lstrip("/")
            proxy.counts[self.command, name] += 1
            fault = proxy.fault(self.command, name)
            if fault == "slow":
                time.sleep(1)
            if fault and fault.isdigit():
                self.answer(int(fault), {}, b"<Error><Code>AccessDenied</Code></Error>")
                return
            connection = http.client.HTTPConnection("127.0.0.1", proxy.port)
            connection.request(self.command, self.path, body, dict(self.headers))
            found = connection.getresponse()
            content = found.read()
            if fault == "damage":
                content = bytes([content[0] ^ 1]) + content[1:]
            self.answer(found.status, dict(found.getheaders()), content, fault == "break")
            connection.close()

        def answer(
            self, status: int, headers: dict[str, str], content: bytes, is_broken: bool = False
        ) -> None:
            self.send_response_only(status)
            for key, value in headers.items():
                if key.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(key, value)
            size = headers.get("Content-Length") if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            if is_broken:
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            elif self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

    return Handler


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def s3_server() -> Iterator[int]:
    """moto's server; yields its port."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "moto has ended"
                assert time.monotonic() < deadline, "moto did not start"
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def make_bucket(port: int, name: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/{name}")
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    connection.close()
