"""As much of OpenSearch as `_bulk` with creates is, and strict about it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit


@dataclass
class Bulk:
    refuses: Callable[[dict[str, Any]], bool]
    answer: bytes | None
    max_bytes: int
    busy_items: int
    url: str = ""
    documents: dict[tuple[str, str], Any] = field(default_factory=dict)
    templates: list[str] = field(default_factory=list)
    bulks: int = 0

    def create(self, action: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
        assert list(action) == ["create"]
        assert sorted(action["create"]) == ["_id", "_index"]
        key = action["create"]["_index"], action["create"]["_id"]
        if self.busy_items:
            self.busy_items -= 1
            return _failed(429, "rejected_execution_exception", "busy")
        if self.refuses(document):
            return _failed(400, "mapper_parsing_exception", "failed to parse")
        if key in self.documents:
            return _failed(409, "version_conflict_engine_exception", "document already exists")
        self.documents[key] = document
        return {"create": {"status": 201}}


def _failed(status: int, kind: str, reason: str) -> dict[str, Any]:
    return {"create": {"status": status, "error": {"type": kind, "reason": reason}}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Bulk

    def do_PUT(self) -> None:
        state, url = self.server_state, urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert dict(parse_qsl(url.query)) == {"create": "true"}
        assert {"index_patterns", "template"} == set(body)
        state.templates.append(url.path.removeprefix("/_index_template/"))
        self.say(200, b'{"acknowledged":true}')

    def do_POST(self) -> None:
        state, url = self.server_state, urlsplit(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert url.path == "/_bulk"
        assert set(dict(parse_qsl(url.query))) <= {"filter_path"}
        assert self.headers["Content-Type"] == "application/x-ndjson"
        assert body.endswith(b"\n")
        if len(body) > state.max_bytes:
            return self.say(413, b"")
        state.bulks += 1
        lines = [json.loads(line) for line in body.splitlines()]
        items = [state.create(*pair) for pair in zip(lines[::2], lines[1::2], strict=True)]
        errors = any("error" in item["create"] for item in items)
        return self.say(200, state.answer or json.dumps({"errors": errors, "items": items}).encode())

    def say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def bulk_server(
    *,
    refuses: Callable[[dict[str, Any]], bool] = lambda _: False,
    answer: bytes | None = None,
    max_bytes: int = 100_000_000,
    busy_items: int = 0,
) -> Iterator[Bulk]:
    state = Bulk(refuses, answer, max_bytes, busy_items)
    handler: Any = type("Handler", (_Handler,), {"server_state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
