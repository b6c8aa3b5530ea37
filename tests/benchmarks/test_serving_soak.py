"""What the soak of a server notices: on a small server that leaks, fails, keeps what nobody waits for, or changes its answers.

tests/vllm_plugin/test_soak.py runs it on vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("aiohttp")

from aiohttp import web

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REQUESTS = argparse.Namespace(requests=400, concurrency=8, leave=0.3, settle=100)


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serving_soak

    return serving_soak


class Server:
    """Answers as vLLM does, with tokens that follow from the prompt; `fault` is what it does wrong."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.answered, self.inside, self.gone = fault, 0, 0, 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.inside += 1
        try:
            return await self._complete(request, await request.json())
        except (asyncio.CancelledError, ConnectionResetError):
            self.gone += 1
            if self.fault == "keeps":
                self.inside += 1
            raise
        finally:
            self.inside -= 1

    async def _complete(self, request: web.Request, body: dict) -> web.StreamResponse:
        self.answered += 1
        first = body["prompt"][0] + (self.answered > 100 and self.fault == "changes")
        if self.fault == "fails" and self.answered == 50:
            return web.Response(status=500, text="out of blocks")
        tokens = list(range(first, first + body["max_tokens"] - (self.fault == "short")))
        if not body.get("stream"):
            await asyncio.sleep(0.001 * body["max_tokens"])
            return web.json_response({"choices": [{"token_ids": tokens}]})
        reply = web.StreamResponse()
        await reply.prepare(request)
        for token in tokens:
            chunk = (
                {"choices": [{"token_ids": [token]}]}
                if self.fault != "stops"
                else {"error": "no memory"}
            )
            await reply.write(f"data: {json.dumps(chunk)}\n\n".encode())
            await asyncio.sleep(0.001)
        return reply

    async def metrics(self, request: web.Request) -> web.Response:
        label = '{engine="0",model_name="model"}'
        inside = f"vllm:num_requests_running{label} {self.inside:.1f}\nvllm:num_requests_waiting{label} 0.0\n"
        return web.Response(text=f"# TYPE vllm:num_requests_running gauge\n{inside}")

    def memory(self) -> int:
        return 10**9 + (100_000 * self.answered if self.fault == "leaks" else 0)

    def soak(self, module, args: argparse.Namespace = REQUESTS):
        """Run the soak on this server."""

        async def both():
            app = web.Application()
            app.router.add_post("/v1/completions", self.complete)
            app.router.add_get("/metrics", self.metrics)
            runner = web.AppRunner(app, handler_cancellation=True)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            try:
                return await module.soak(f"http://127.0.0.1:{port}", self.memory, 1000, args)
            finally:
                await runner.cleanup()

        return asyncio.run(both())


@pytest.fixture
def brief(soak, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(soak, "PATIENCE", 0.2)


def test_a_server_that_is_right_passes(soak, brief):
    server = Server()
    found = server.soak(soak)
    assert found.wrong(0.03) == []
    assert found.ended == 400
    assert [ended for ended, _ in found.samples] == [100, 200, 300, 400]
    assert 60 < found.left < 160  # 0.3 of 400, but a few get their answer before they leave
    assert 0.8 * found.left < server.gone <= found.left  # some leave before the request is read
    assert "| 400 | " in found.table()


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("leaks", r"memory is not flat: 1\.0\d\d of that after 100 requests"),
        (
            "fails",
            "1 requests failed; the first: RuntimeError: the server answered 500: out of blocks",
        ),
        (
            "stops",
            "requests failed; the first: RuntimeError: the server stopped with an error: .*no memory",
        ),
        ("keeps", "requests of clients that left are in the engine"),
        ("changes", "one prompt was answered differently before and after"),
    ],
)
def test_a_fault_is_noticed(soak, brief, fault, text):
    (wrong,) = Server(fault).soak(soak).wrong(0.02)
    assert re.search(text, wrong), wrong


def test_an_answer_of_another_length_is_an_error(soak):
    with pytest.raises(RuntimeError, match="asked for 16 tokens, got 15"):
        Server("short").soak(soak)


def test_memory_that_falls_is_not_flat_either(soak):
    """The first sample would be a peak, behind which a leak could hide."""
    found = soak.Soak(500, samples=[(100, 90), (500, 100), (600, 99), (700, 96), (800, 98)])
    assert (found.settled, found.ratio) == (100, 0.96)
    assert found.wrong(0.03) == ["memory is not flat: 0.960 of that after 500 requests"]
    assert found.wrong(0.05) == []


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (["--settle", "150"], "--settle must be a multiple of 100"),
        (["--leave", "0"], "--leave must be above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(option, text):
    command = [sys.executable, str(BENCHMARKS / "serving_soak.py"), "nowhere", *option]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 2
    assert text in done.stderr
