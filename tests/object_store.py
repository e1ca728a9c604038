"""An S3 server in a process of its own (moto's), and in front of it a proxy that counts and breaks things."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from attrs import define, field, frozen

KEY, SECRET = "AKIAREGISTRYTESTS", "vErYsEcReTaCcEsSkEy0123456789"
_READY = 60.0


@frozen
class Request:
    """What a client has asked for, and the bytes of the answer's body."""

    method: str
    path: str
    sent: int
    received: int
    status: int

    @property
    def is_part(self) -> bool:
        """Is it a part of a multipart upload?"""
        return self.method == "PUT" and "uploadId=" in self.path


@define(eq=False)
class Proxy:
    """Passes requests on. `fault(method, path)` may give a status that is answered instead."""

    server_port: int
    port: int = 0
    fault: Callable[[str, str], int | None] | None = None
    requests: list[Request] = field(factory=list)

    @property
    def url(self) -> str:
        """What clients take for the server."""
        return f"http://127.0.0.1:{self.port}"

    def received(self) -> int:
        """Bytes of all answers' bodies."""
        return sum(request.received for request in self.requests)

    def clear(self) -> None:
        """Forget requests and faults."""
        self.requests.clear()
        self.fault = None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: ClassVar[Proxy]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _pass(self) -> None:
        body = self._body()
        status = self.proxy.fault(self.command, self.path) if self.proxy.fault else None
        if status is not None:
            code = {403: "AccessDenied", 404: "NoSuchBucket"}.get(status, "InternalError")
            answer = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}, said the proxy</Message></Error>"
            headers, data = [("Content-Type", "application/xml")], answer.encode()
        else:
            status, headers, data = self._forward(body)
        length = len(data)
        if self.command == "HEAD":
            length = int(next((v for k, v in headers if k.lower() == "content-length"), 0))
            data = b""
        self.proxy.requests.append(Request(self.command, self.path, len(body), len(data), status))
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        onward = http.client.HTTPConnection("127.0.0.1", self.proxy.server_port, timeout=60)
        skipped = ("transfer-encoding", "content-length", "expect", "connection")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in skipped}
        try:
            onward.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            answer = onward.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            onward.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def object_store() -> Iterator[Proxy]:
    """The server and the proxy, as long as the block lasts."""
    port = _free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    front: ThreadingHTTPServer | None = None
    try:
        deadline = time.monotonic() + _READY
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "moto's server does not start"
                time.sleep(0.05)
        proxy = Proxy(port)
        handler = type("Handler", (_Handler,), {"proxy": proxy})
        front = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        front.daemon_threads = True
        proxy.port = front.server_address[1]
        threading.Thread(target=front.serve_forever, daemon=True).start()
        yield proxy
    finally:
        if front is not None:
            front.shutdown()
            front.server_close()
        server.kill()
        server.wait(30)
