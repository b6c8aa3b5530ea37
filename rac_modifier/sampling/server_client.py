"""OpenAI-compatible servers: the models that one lists, and answers that pass our checks.

Every request has a deadline and a limit on the bytes of its answer.
"""

import asyncio
import json
import os
import random
import re
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.sampling.completions_api import (
    RefusedError,
    UnavailableError,
    UnusableError,
    error_text,
)
from rac_modifier.settings.sampling import EngineSettings

Answer = TypeVar("Answer")
TRIES = 9  # requests per completion
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds between two tries; each pause doubles the last one
_LONGEST_RETRY_AFTER = 60.0  # seconds of a server's Retry-After that are waited
_TRANSIENT = frozenset({408, 409, 425, 429})  # and every 5xx; other statuses stay the same
_REFUSALS = frozenset({400, 413, 422})  # of this prompt, not of the next
_SETUP_TIMEOUT = 30.0
_CONNECT_TIMEOUT = 10.0
_IDLE = 4.0  # seconds that a connection is kept; uvicorn closes it after 5
_LIST_BYTES = 1 << 22
_SHORTEST_KEY = 12  # characters; a shorter one, such as EMPTY, may be a word of an answer
_ANSWER_BYTES = 1 << 20  # of an answer, and for each token of prompt and completion:
_BYTES_PER_TOKEN = 256


class ServerClient:
    """A base URL, which ends in /v1."""

    def __init__(self, url: str, settings: EngineSettings):
        self.url = url
        self.model = ""  # the name of the model there
        self.under_way = 0  # completions that are waited for
        self.failing = False  # whether the last completion failed
        self._deadline = settings.timeout
        self._key = _api_key(settings.api_key_env)
        self._proxy = _proxy_of(url)
        self._session: aiohttp.ClientSession | None = None  # belongs to the running event loop

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def list_models(self) -> bytes:
        """Return the body of the answer to GET /v1/models."""
        try:
            status, content, _ = await self._send(
                "GET", "/models", None, _LIST_BYTES, _SETUP_TIMEOUT
            )
        except UnusableError as error:
            raise RacError(
                f"no server answers at {self.url} ({error}); start it, or correct its address "
                "(--server, or traces.engine.base_urls of a recipe)"
            ) from error
        if status != 200:
            reason = error_text(content)
            raise RacError(f"{self.url}/models answers {status} ({reason}); {_next_step(status)}")
        return content

    async def post(self, path: str, body: dict[str, Any], tokens: int) -> bytes:
        """Return the body of the answer with status 200 to a request of up to `tokens` tokens.

        UnusableError if another try may succeed (UnavailableError: when the server is back),
        RefusedError if the server rejects the prompt, RacError if it rejects every prompt.
        """
        most = _ANSWER_BYTES + _BYTES_PER_TOKEN * tokens
        self.under_way += 1
        try:
            status, content, pause = await self._send("POST", path, body, most, self._deadline)
        finally:
            self.under_way -= 1
        if status == 200:
            return content
        message = f"answers {status}: {error_text(content)}"
        if status in _TRANSIENT or status > 500:
            raise UnavailableError(message, pause)
        if status == 500:  # the prompt may be the reason
            raise UnusableError(message)
        if status in _REFUSALS:
            raise RefusedError(f"{self.url} {message}")
        raise RacError(f"{self.url} {message}; {_next_step(status)}")

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None, most: int, seconds: float
    ) -> tuple[int, bytes, float]:
        """Return status, body and Retry-After; the API key, which may be echoed, is cut."""
        if self._session is None:
            self._session = self._open_session()
        content, url = bytearray(), f"{self.url}{path}"
        options: dict[str, Any] = {"json": body, "allow_redirects": False, "proxy": self._proxy}
        try:
            async with (
                asyncio.timeout(seconds),
                self._session.request(method, url, **options) as answer,
            ):
                async for chunk in answer.content.iter_any():
                    content += chunk
                    if len(content) > most:
                        raise UnusableError(f"an answer of more than {most:,} bytes")
        except (aiohttp.ClientError, ConnectionError) as error:
            raise UnavailableError(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        except TimeoutError as error:
            raise UnusableError(
                f"no answer within timeout={seconds:g} s; set a longer one"
            ) from error
        is_answer = method == "POST" and answer.status == 200 and b'"choices"' in content
        if self._key and not (is_answer and len(self._key) < _SHORTEST_KEY):
            for key in (self._key, json.dumps(self._key)[1:-1]):
                content = content.replace(key.encode(), b"***")
        return answer.status, bytes(content), _seconds(answer.headers.get("Retry-After"))

    def _open_session(self) -> aiohttp.ClientSession:
        headers = {"Accept-Encoding": "identity"}  # a compressed body could expand without limit
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return aiohttp.ClientSession(
            headers=headers,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT),
        )


async def ask(
    servers: Sequence[ServerClient],
    path: str,
    body: dict[str, Any],
    tokens: int,
    read: Callable[[bytes, str], Answer],
) -> Answer:
    """Post a request until `read` takes the answer, of which it gets body and address.

    Each try goes to the least busy server that has not been tried. The pause before it doubles.
    Where every server has failed, it is at least the last one's Retry-After. After `TRIES` failures
    the last error is raised. No other error of `ServerClient.post` and `read` is tried again.
    """
    pause, failures = FIRST_PAUSE, 0
    tried: list[ServerClient] = []
    while True:
        if len(tried) == len(servers):
            tried = []
        # A server that fails immediately always has few completions under way. It gets one at a
        # time, until one succeeds.
        server = min(
            (server for server in servers if server not in tried),
            key=lambda server: (server.failing and server.under_way > 0, server.under_way),
        )
        tried.append(server)
        wanted = 0.0
        try:
            content = await server.post(path, {"model": server.model, **body}, tokens)
            answer = read(content, server.url)
        except UnusableError as error:
            failures += 1
            if not server.failing:
                logger.warning(f"{server.url}: {error}")
            server.failing = True
            if failures == TRIES:
                message = f"{server.url}: {error} (tried {TRIES} times)"
                raise type(error)(message) from error
            if isinstance(error, UnavailableError) and len(tried) == len(servers):
                wanted = error.pause
        else:
            server.failing = False
            return answer
        jitter = 1 - random.random() / 4  # so that many requests do not return together
        await asyncio.sleep(max(pause * jitter, wanted))
        pause = min(2 * pause, LONGEST_PAUSE)


def _seconds(retry_after: str | None) -> float:
    """Read a Retry-After in seconds, 0 without one; a date is not read."""
    text = (retry_after or "").strip()
    return min(float(text), _LONGEST_RETRY_AFTER) if re.fullmatch(r"[0-9]{1,9}", text) else 0.0


def _proxy_of(url: str) -> str | None:
    """Return the proxy that the environment names for a server; None for this machine."""
    address = urlsplit(url)
    host = address.hostname or ""
    if host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host):
        return None
    proxies = {} if urllib.request.proxy_bypass(host) else urllib.request.getproxies()
    return proxies.get(address.scheme) or proxies.get("all")


def _api_key(variable: str | None) -> str | None:
    if variable is not None and not os.environ.get(variable):
        raise RacError(
            f"api_key_env names {variable!r}, which is not set; export it, or leave api_key_env out"
        )
    key = None if variable is None else os.environ[variable]
    if key is not None and not (key.isascii() and key.isprintable()):
        raise RacError(
            f"{variable} (api_key_env) holds a line break or another character that no request "
            "takes; export the key alone"
        )
    return key


def _next_step(status: int) -> str:
    if status in _TRANSIENT or status >= 500:
        return "wait until the server is ready, then run again"
    if status in (401, 403):
        return (
            "the server wants a key: export it as OPENAI_API_KEY for rac eval, or in a recipe name "
            "its variable with engine.api_key_env"
        )
    return "check address (it ends in /v1) and model (--server and --served-as, or traces.engine)"
