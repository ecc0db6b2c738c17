"""An S3 server on 127.0.0.1 with a bucket "caches": moto's, by HTTP/1.1 as the real one. Prints its port; runs until it
is killed.

moto's own server closes every connection after one answer and stores a body of which only the beginning arrived.
"""

from __future__ import annotations

import io
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import create_backend_app

moto: Any = create_backend_app("s3")  # moto's own server looks for the service, in its files, at every request
one_at_a_time = threading.Lock()  # a condition on a PUT and the PUT are one step


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def serve(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True
            return
        started: list[Any] = []
        with one_at_a_time:
            answer = b"".join(
                moto(self.environ(body), lambda status, headers, *_: started.append((int(status.split()[0]), headers)))
            )
        (code, headers), is_head = started[0], self.command == "HEAD"
        self.send_response_only(code)
        for name, value in headers:
            if is_head or name.lower() != "content-length":
                self.send_header(name, value)
        if not is_head and code not in (204, 304):
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if not is_head:
            self.wfile.write(answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

    def environ(self, body: bytes) -> dict[str, Any]:
        """The request as WSGI has it."""
        url = urlsplit(self.path)
        return {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in self.headers.items()} | {
            "REQUEST_METHOD": self.command,
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote_to_bytes(url.path).decode("latin-1"),
            "QUERY_STRING": url.query,
            "RAW_URI": self.path,
            "REQUEST_URI": self.path,
            "SERVER_PROTOCOL": "HTTP/1.1",
            "CONTENT_LENGTH": str(len(body)),
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "80",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }

    def log_message(self, *_: object) -> None: ...


class Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Connections that are cut are what some tests are about."""


if __name__ == "__main__":
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket("caches", "us-east-1")
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
