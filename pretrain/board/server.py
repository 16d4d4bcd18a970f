"""The board's server: pages to read, nothing to change.

It listens on this machine alone unless told otherwise, and answers to no other name than its own,
so that a page of the web cannot read it through the reader's browser.
"""

from __future__ import annotations

import contextlib
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from model.errors import UserError, debugging
from model.words import printable
from pretrain.board.pages import Board
from pretrain.report.page import TEMPLATES

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HTML, PLAIN, SCRIPT = "text/html", "text/plain", "text/javascript"
NAMES = ("localhost", "127.0.0.1", "[::1]")
"""By which a browser on this machine may call it."""


class BoardServer(ThreadingHTTPServer):
    """Serves a board until it is shut down."""

    daemon_threads = True

    def __init__(self, board: Board, host: str, port: int, interval_s: float) -> None:
        """host: a name or an address of this machine; port 0 takes a free one.

        interval_s: seconds after which open pages look again.
        Raises UserError where the port is not to be had.
        """
        self.board, self.interval_s, self.host = board, interval_s, host
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise UserError(
                f"cannot listen at {host}:{port} ({error.strerror or error}): choose another --port or --host"
            ) from None

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{self.host}:{self.server_address[1]}/"

    def known(self, name: str) -> bool:
        """Whether a browser that calls the server by this name (`Host`) is to be answered."""
        return name.rpartition(":")[0] in (*NAMES, self.host) or name in (*NAMES, self.host)


class _Handler(BaseHTTPRequestHandler):
    server: BoardServer
    server_version, sys_version = "fathom", ""
    timeout: ClassVar[int] = 60

    def do_GET(self) -> None:
        if not self.server.known(self.headers.get("Host", "")):
            self._answer(HTTPStatus.FORBIDDEN, PLAIN, "the board is not called by this name")
            return
        try:
            kind, text = self._page(unquote(urlsplit(self.path).path))
        except KeyError:
            self._answer(HTTPStatus.NOT_FOUND, PLAIN, "no run is there (any more)")
        except UserError as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, PLAIN, printable(str(error), 1000))
        except Exception as error:
            if debugging():
                raise
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, PLAIN, f"{type(error).__name__}: {error}"[:1000])
        else:
            self._answer(HTTPStatus.OK, kind, text)

    def _page(self, path: str) -> tuple[str, str]:
        board, interval = self.server.board, self.server.interval_s
        if path == "/":
            return HTML, board.index(interval)
        if path == "/rows":
            return HTML, board.table()
        if path == "/board.js":
            return SCRIPT, (TEMPLATES / "board.js").read_text(encoding="utf-8")
        kind, _, place = path.lstrip("/").partition("/")
        if kind == "run":
            return HTML, board.run(place, interval)
        if kind == "version":
            return PLAIN, board.version(place)
        raise KeyError(path)

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        with contextlib.suppress(ConnectionError):  # the reader has left
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing of requests; of what went wrong with one, only to who looks for faults."""
        if debugging():
            print(format % args, file=sys.stderr)
