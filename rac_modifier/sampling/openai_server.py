"""The engine on OpenAI-compatible servers: many completions under way at once, and every fault tried again.

httpx rather than the `openai` client: three kinds of request, and transformers brings httpx already. Retries, back-off and
what counts as an answer are ours in any case, since a truncated answer or one without token ids is a fault here.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.sampling.completions_api import Ask, UnusableError, error_text, read_answer, trace_seed
from rac_modifier.sampling.engine import EngineKind, EngineRecord, Failure, Probe, Prompt
from rac_modifier.sampling.generate import Generation
from rac_modifier.sampling.load_balancer import Balancer, Server, pause, retry_after
from rac_modifier.sampling.probes import (
    PROBE_QUESTIONS,
    PROBE_SAMPLING,
    PROBE_TOKENS,
    check_card,
    check_probes,
    served_model,
)
from rac_modifier.sampling.prompts import render_question
from rac_modifier.sampling.subject import Subject
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings

try:
    import httpx
except ImportError as error:
    raise RacError("sampling from a server needs httpx: `pip install 'rac-modifier[compress]'`") from error

_TRANSIENT = frozenset({408, 409, 425, 429})  # and every 5xx
_SETUP_TIMEOUT = 30.0
_CONNECT_TIMEOUT = 10.0


class ServerEngine:
    """Completes prompts, sent as token ids, on one or several servers.

    Args:
        settings: which servers, and how hard to use them.
        subject: the model they must serve.
        tokenizer: of that model, for EOS and for the prompts of the check.
        sampling: resolved settings.
        model: the model itself, where its weights are in memory; the servers' greedy tokens are compared with it.
    """

    kind: EngineKind = "openai"
    batch_size = 1

    def __init__(
        self,
        settings: EngineSettings,
        subject: Subject,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingSettings,
        model: PreTrainedModel | None = None,
    ):
        self.concurrency = settings.concurrency
        self._settings, self._subject, self._tokenizer = settings, subject, tokenizer
        self._sampling, self._model = sampling, model
        self._eos = subject.eos(tokenizer)
        self._balancer = Balancer(settings.base_urls)
        self._served: dict[str, str] = {}
        self._server_limit: int | None = None  # the shortest max_model_len
        self._record: EngineRecord | None = None
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(settings.timeout, connect=min(_CONNECT_TIMEOUT, settings.timeout), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.concurrency),
            headers=_authorization(settings.api_key_env),
        )
        # A loop of its own in a thread: it goes on while traces are written, and works in a notebook, which has one.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trace-servers", daemon=True)
        self._thread.start()

    def connect(self) -> EngineRecord:
        """Ask each server what it serves, and compare it with the model.

        Raises:
            RacError: unreachable, another model, no token ids, or too short a limit.
        """
        if self._record is None:
            self._record = asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result()
        return self._record

    def submit(self, prompts: Sequence[Prompt]) -> list[Future[Generation | Failure]]:
        """Begin to complete prompts; call `connect` first."""
        return [asyncio.run_coroutine_threadsafe(self._complete(prompt), self._loop) for prompt in prompts]

    def close(self) -> None:
        """Drop what is under way (a server notices and stops working on it) and end the thread."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _connect(self) -> EngineRecord:
        found = [await self._look_at(server) for server in self._balancer.servers]
        first = found[0][0]
        return EngineRecord(
            kind=self.kind,
            served_model=str(first["id"]),
            root=str(first["root"]) if first.get("root") else None,
            probes=tuple(probe for _, probes in found for probe in probes),
        )

    async def _look_at(self, server: Server) -> tuple[dict[str, Any], list[Probe]]:
        url = server.url
        try:
            answer = await self._client.get(f"{url}/models", timeout=_SETUP_TIMEOUT)
        except httpx.HTTPError as error:
            raise RacError(f"no server answers at {url} ({_words(error)}); start it, or correct base_urls") from error
        if answer.status_code != 200:
            raise RacError(
                f"{url}/models answers {answer.status_code} ({error_text(answer.content)}); {_way_out(answer)}"
            )
        card = served_model(answer.content, self._settings.model, url)
        check_card(card, self._subject.name, self._subject.context, self._sampling.max_new_tokens, url)
        self._served[url] = str(card["id"])
        if isinstance(limit := card.get("max_model_len"), int):
            self._server_limit = min(limit, self._server_limit or limit)
        probes = await self._probe(server) if self._settings.verify_model else []
        if not probes:
            logger.warning(
                f"{url}: the served model is not compared with the model to be compressed (verify_model: false)"
            )
        elif self._model is None:
            logger.info(f"{url}: greedy tokens are kept in the store, to be compared when the model is in memory")
        else:
            await asyncio.to_thread(check_probes, self._model, probes, url)
        return card, probes

    async def _probe(self, server: Server) -> list[Probe]:
        prompts = [render_question(self._tokenizer, question, self._sampling) for question in PROBE_QUESTIONS]
        asks = [partial(self._ask, ids=ids, limit=PROBE_TOKENS, seed=0) for ids in prompts]
        answers = await asyncio.gather(*(self._insist(ask, PROBE_SAMPLING, server) for ask in asks))
        probes = []
        for ids, answer in zip(prompts, answers, strict=True):
            if isinstance(answer, Failure):
                raise RacError(f"{server.url} does not answer a short greedy prompt: {answer.reason}")
            probes.append(Probe(prompt_ids=tuple(ids), completion_ids=answer.ids))
        return probes

    async def _complete(self, prompt: Prompt) -> Generation | Failure:
        length, limit = len(prompt.ids), self._sampling.max_new_tokens
        if self._subject.context is not None:
            limit = min(limit, self._subject.context - length)
            if limit < 1:
                return Failure(f"the prompt of {length} tokens fills the model's context of {self._subject.context}")
        if self._server_limit is not None and length + limit > self._server_limit:
            return Failure(
                f"a prompt of {length} and a completion of up to {limit} tokens do not fit the servers' --max-model-len of "
                f"{self._server_limit}; serve with a larger one"
            )
        seed = trace_seed(self._sampling.seed, prompt.key)
        return await self._insist(partial(self._ask, ids=prompt.ids, limit=limit, seed=seed), self._sampling)

    def _ask(self, server: Server, ids: list[int], limit: int, seed: int) -> Ask:
        return Ask(self._served[server.url], ids, limit, seed, self._eos)

    async def _insist(
        self, ask: Callable[[Server], Ask], sampling: SamplingSettings, only: Server | None = None
    ) -> Generation | Failure:
        """Ask until an answer is usable: another server where there is one, a longer pause each time."""
        reason, server = "", only
        for tries in range(1, self._settings.tries + 1):
            server = only or await self._free_server(server)
            asked_at = self._balancer.clock()
            server.under_way += 1
            try:
                async with asyncio.timeout(self._settings.timeout):
                    generation = await self._once(server, ask(server), sampling)
                server.answered()
                return generation
            except _RefusedError as refused:
                return Failure(str(refused))
            except (TimeoutError, httpx.ReadTimeout):  # it is busy, as its requests under way say
                reason = f"{server.url}: no answer within timeout={self._settings.timeout:g} s; set a longer one"
                logger.warning(reason)
            except (httpx.HTTPError, UnusableError) as error:
                reason = f"{server.url}: {_words(error)}"
                if server.rest(asked_at, self._balancer.clock(), getattr(error, "seconds", None)):
                    logger.warning(f"{reason}; trying again")
            finally:
                server.under_way -= 1
            if tries < self._settings.tries:
                await asyncio.sleep(pause(tries))
        return Failure(f"{reason} (tried {self._settings.tries} times)")

    async def _free_server(self, last: Server | None) -> Server:
        server, wait = self._balancer.take(last)
        while wait > 0:
            await asyncio.sleep(wait)
            server, wait = self._balancer.take(last)
        return server

    async def _once(self, server: Server, ask: Ask, sampling: SamplingSettings) -> Generation:
        answer = await self._client.post(f"{server.url}/completions", json=ask.body(sampling))
        status = answer.status_code
        if status == 200:
            return read_answer(ask, answer.content, self._subject.vocab_size, server.url)
        message = f"answers {status}: {error_text(answer.content)}"
        if status in _TRANSIENT or status >= 500:
            raise UnusableError(message, retry_after(answer.headers.get("retry-after")))
        if status in (400, 413, 422):
            raise _RefusedError(f"{server.url} {message}")  # this prompt, not the next
        raise RacError(f"{server.url} {message}; {_way_out(answer)}")


class _RefusedError(Exception):
    """A server will not complete this prompt, however often it is asked."""


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    if not os.environ.get(variable):
        raise RacError(f"api_key_env names {variable!r}, which is not set; export it, or leave api_key_env out")
    return {"Authorization": f"Bearer {os.environ[variable]}"}


def _way_out(answer: httpx.Response) -> str:
    if answer.status_code in (401, 403):
        return "the server wants a key: name the environment variable that holds it with engine.api_key_env"
    return "check base_urls (they end in /v1) and engine.model"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ") if not isinstance(error, UnusableError) else str(error)
