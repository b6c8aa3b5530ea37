"""A completions server on loopback that answers from a rule, and with faults where a test wants
them."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

EOS = 1
NAME = "tiny"


def rule(body: dict[str, Any]) -> list[int]:
    """Token ids that depend on prompt and seed alone, as a deterministic engine's do; half of them
    end on EOS."""
    digest = hashlib.sha256(f"{body['seed']}/{body['prompt']}".encode()).digest()
    ids = [2 + b % 90 for b in digest[: body["max_tokens"]]]
    length = 1 + digest[-1] % len(ids)
    return [*ids[: length - 1], EOS] if digest[-2] % 2 else ids


def shorten_pauses(monkeypatch: Any) -> None:
    """Make the pauses between two tries short."""
    monkeypatch.setattr("rac_modifier.sampling.server_client.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("rac_modifier.sampling.server_client.LONGEST_PAUSE", 0.05)


class FakeServer:
    """`fault` gets each completion request's number and body, and names what to do wrong, or None.

    Faults: a status such as 500, hang, drip (a byte now and then), reset, truncate, garbage, large
    (a body without end), deep (nested JSON), no_ids, short, miscount.
    """

    def __init__(self, port: int = 0) -> None:
        self.fault: Callable[[int, dict[str, Any]], str | None] = lambda number, body: None
        self.answer: Callable[[dict[str, Any]], list[int]] = rule
        self.chat: Callable[[dict[str, Any]], Any] = lambda body: None  # JSON of a chat answer
        self.cards: list[dict[str, Any]] = [
            {"id": NAME, "root": "/models/tiny", "max_model_len": 512}
        ]
        self.list_status = 200
        self.key: str | None = None  # the API key that every request must have
        self.retry_after: str | None = None  # sent with every answer
        self.delay: Callable[[dict[str, Any]], float] = lambda body: 0.0
        self.bodies: list[dict[str, Any]] = []
        self.faults: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []  # names in lower case
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self.released = threading.Event()
        self.arrived = threading.Semaphore(0)  # released for each completion request
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # a client that was killed
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=lambda: self._http.serve_forever(0.02), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    @contextmanager
    def counted(self, body: dict[str, Any]):
        with self._lock:
            self.bodies.append(body)
            number = len(self.bodies) - 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield number
        finally:
            with self._lock:
                self._now -= 1


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        pass

    def refused(self) -> bool:
        """Note the headers; refuse a request without the key."""
        self.fake.headers.append({name.lower(): value for name, value in self.headers.items()})
        key = self.fake.key
        if key is None or self.headers["authorization"] == f"Bearer {key}":
            return False
        self.send(401, {"error": {"message": "no key"}})
        return True

    def do_GET(self) -> None:
        if self.refused():
            return
        self.send(self.fake.list_status, {"object": "list", "data": self.fake.cards})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.refused():
            return
        with self.fake.counted(body) as number:
            self.fake.arrived.release()
            time.sleep(self.fake.delay(body))
            fault = self.fake.fault(number, body)
            if fault is not None:
                self.fake.faults[fault] += 1
            try:
                self.reply(body, fault)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

    def reply(self, body: dict[str, Any], fault: str | None) -> None:
        if fault in ("hang", "reset"):
            self.close_connection = True
            if fault == "hang":
                self.fake.released.wait()
            self.connection.close()
        elif fault in ("drip", "large"):
            self.endless(b" ", pause=0.05) if fault == "drip" else self.endless(b" " * 65536)
        elif fault == "deep":
            self.send(200, b"[" * 100_000)
        elif fault == "echo":
            self.send(500, {"error": {"message": self.headers["authorization"]}})
        elif fault in ("307", "500", "401", "400", "404", "429", "503"):
            self.send(int(fault), {"error": {"message": f"told to answer {fault}"}})
        elif self.path.endswith("/chat/completions"):
            self.send(200, self.fake.chat(body))
        else:
            self.complete(body, fault)

    def complete(self, body: dict[str, Any], fault: str | None) -> None:
        ids = self.fake.answer(body)
        choice = {
            "index": 0,
            "text": "text",
            "finish_reason": "stop" if ids[-1] == EOS else "length",
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
        }
        if fault == "no_ids":
            choice["token_ids"] = choice["prompt_token_ids"] = None
        if fault == "short":
            choice |= {"token_ids": [5], "finish_reason": "length"}
        usage = {"completion_tokens": len(choice["token_ids"] or ids) + (fault == "miscount")}
        content = json.dumps({"choices": [choice], "usage": usage}).encode()
        if fault == "garbage":
            content = content[: len(content) // 2]
        self.send(200, content, cut=fault == "truncate")

    def endless(self, piece: bytes, pause: float = 0.0) -> None:
        """Send a body of 1 GB, until the client goes away or the test ends."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Length", str(10**9))
        self.end_headers()
        while not self.fake.released.wait(pause):
            self.wfile.write(piece)

    def send(self, status: int, content: Any, cut: bool = False) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if self.fake.retry_after is not None:
            self.send_header("Retry-After", self.fake.retry_after)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True
