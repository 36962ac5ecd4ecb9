"""A web server and a mail server on loopback, for notifications: they keep what they get, and misbehave on request."""

from __future__ import annotations

import json
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWERS = {b"EHLO": b"250-inbox\r\n250 AUTH PLAIN\r\n", b"AUTH": b"235 come in\r\n", b"QUIT": b"221 bye\r\n"}


class Inbox:
    """`posts`: (path, JSON) of each request; `mails`: the text of each mail. `status`: what the web server answers; a
    request for /hang gets no answer, one for /away is sent to /ok."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.mails: list[str] = []
        self.status = 200
        self.web = self.mail = 0  # the ports


@contextmanager
def inbox() -> Iterator[Inbox]:
    """Both servers, as long as the context lasts."""
    kept = Inbox()

    class Web(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            kept.posts.append((self.path, body))
            if "hang" in self.path:
                time.sleep(60)
            self.send_response(302 if "away" in self.path else kept.status)
            self.send_header("Location", "/ok")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Mail(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 inbox\r\n")
            for line in self.rfile:
                word = line[:4].upper()
                if word == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    lines = iter(self.rfile.readline, b".\r\n")
                    kept.mails.append(b"".join(lines).decode())
                self.wfile.write(ANSWERS.get(word, b"250 ok\r\n"))

    class MailServer(socketserver.ThreadingTCPServer):
        daemon_threads = True

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Web), MailServer(("127.0.0.1", 0), Mail)]
    kept.web, kept.mail = (server.server_address[1] for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield kept
    for server in servers:
        server.shutdown()
        server.socket.close()
