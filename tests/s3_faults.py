"""A proxy before an S3 server that answers chosen requests itself, with an error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

_HOP = {"connection", "transfer-encoding", "content-length", "content-encoding", "server", "date"}


class FaultyProxy:
    """Passes requests on to `endpoint`; those of a method in `refused` are answered with its status instead."""

    def __init__(self, endpoint: str) -> None:
        self.refused: dict[str, int] = {}
        self._endpoint = endpoint

    @contextmanager
    def running(self) -> Iterator[str]:
        """Listen on a free port of this machine; the proxy's endpoint."""
        proxy, client = self, httpx.Client(base_url=self._endpoint, timeout=30)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if (status := proxy.refused.get(self.command)) is not None:
                    self.reply(status, {}, b"")
                    return
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                answer = client.request(self.command, self.path, headers=headers, content=body)
                kept = {name: value for name, value in answer.headers.items() if name not in _HOP}
                self.reply(answer.status_code, kept, answer.content)

            def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = do  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
            client.close()
