"""The engine on OpenAI-compatible servers: many completions under way at once, over one or several servers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain
from pathlib import PurePath
from queue import SimpleQueue
from typing import Any

from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.machine_paths import public_name
from rac_modifier.sampling.completions_api import Request, trace_seed
from rac_modifier.sampling.engine import (
    Completion,
    EngineKind,
    EngineRecord,
    Failure,
    Probe,
    Prompt,
)
from rac_modifier.sampling.generate import Generation, warn_of_cap
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.sampling.probes import (
    PROBE_QUESTIONS,
    PROBE_SAMPLING,
    PROBE_TOKENS,
    check_card,
    check_name,
    check_probes,
    served_model,
)
from rac_modifier.sampling.prompts import render_question
from rac_modifier.sampling.server_client import GaveUpError, RefusedError, ServerClient
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings

_TRIES_BEFORE_ANOTHER = (
    2  # with several servers, so that one that hangs or is gone holds nothing up for long
)
# Prompts are taken up to this many times the concurrency ahead of the oldest unfinished one. That keeps the servers busy while
# one long completion is waited for, and bounds how many finished ones are in memory.
_LOOK_AHEAD = 4
# One prompt more is taken for each so many, and sent as soon as a completion ends: servers do not wait while traces are written.
_READY = 8


class ServerEngine:
    """Completes prompts, sent as token ids, on one or several servers.

    Args:
        settings: which servers, and how many completions at once.
        identity: the model that they must serve.
        tokenizer: of that model, for EOS and for the prompts of the check.
        sampling: resolved settings.
        model: the model itself, where its weights are in memory; the servers' greedy tokens are compared with it.
        evaluates: answers are judged, and nothing is calibrated on them. Servers that return no token ids are accepted then
            where `verify_model` is set; `kind` is "openai text" once one of them has answered. The name of what a server
            loaded is compared with that of the model, unless `settings.model` names it or `model` is there.
    """

    batch_size = 1

    def __init__(
        self,
        settings: EngineSettings,
        identity: ModelIdentity,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingSettings,
        model: PreTrainedModel | None = None,
        evaluates: bool = False,
    ):
        self.kind: EngineKind = "openai"
        self._settings, self._identity, self._tokenizer = settings, identity, tokenizer
        self._sampling, self._model = sampling, model
        self._eos = identity.eos(tokenizer)
        tokenize = self._tokenized if evaluates and settings.verify_model else None
        self._evaluates = evaluates
        self._by_name = evaluates and model is None and settings.model is None
        self._servers = [ServerClient(url, settings, tokenize) for url in settings.base_urls]
        several, tries = len(self._servers) > 1, settings.tries
        # Tries per server: first a few at each of several servers, then all that are left at each.
        first = min(_TRIES_BEFORE_ANOTHER, tries) if several else tries
        self._rounds = [n for n in (first, tries - first) if n]
        self._served: dict[str, str] = {}
        self._server_limit: int | None = None  # the shortest max_model_len
        self._places = asyncio.Semaphore(settings.concurrency)
        self._record: EngineRecord | None = None
        # An event loop in a thread of its own: it runs on while traces are written, and works in a notebook, which has a loop.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="trace-servers", daemon=True
        )
        self._thread.start()

    def connect(self) -> EngineRecord:
        """Ask each server which model it serves, and compare that with ours.

        Raises:
            RacError: unreachable, another model, no token ids, or too short a limit.
        """
        if self._record is None:
            self._record = asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result()
        return self._record

    def iter_completions(
        self, batches: Iterable[Sequence[Prompt]]
    ) -> Iterator[Sequence[Completion]]:
        """Complete prompts, `concurrency` at once; a few more are taken and wait. Call `connect` first.

        Raises:
            RacError: a server wants a key, does not return token ids, or the like.
        """
        prompts = chain.from_iterable(batches)
        under_way: dict[Future[Generation | Failure], tuple[int, Prompt]] = {}  # the oldest first
        done: SimpleQueue[Future[Generation | Failure]] = SimpleQueue()
        taken = 0
        while True:
            while self._has_room(under_way, taken) and (prompt := next(prompts, None)) is not None:
                future = asyncio.run_coroutine_threadsafe(self._complete(prompt), self._loop)
                under_way[future] = taken, prompt
                future.add_done_callback(done.put)
                taken += 1
            if not under_way:
                return
            ended = [done.get()]
            while not done.empty():
                ended.append(done.get())
            finished: list[Completion] = []
            stop: RacError | None = None
            for future in sorted(ended, key=lambda future: under_way[future][0]):
                _, prompt = under_way.pop(future)
                try:
                    finished.append(Completion(prompt, future.result()))
                except RacError as error:
                    stop = error
            if finished:
                yield finished
            if stop is not None:
                raise stop

    def _has_room(
        self, under_way: dict[Future[Generation | Failure], tuple[int, Prompt]], taken: int
    ) -> bool:
        oldest = next(iter(under_way.values()))[0] if under_way else taken
        concurrency = self._settings.concurrency
        room = concurrency + concurrency // _READY
        return len(under_way) < room and taken - oldest < _LOOK_AHEAD * concurrency

    def close(self) -> None:
        """Drop the requests under way (a server notices, and stops working on them) and end the thread."""
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
        for server in self._servers:
            await server.close()

    async def _connect(self) -> EngineRecord:
        found = [await self._look_at(server) for server in self._servers]
        first = found[0][0]
        return EngineRecord(
            kind=self.kind,
            served_model=public_name(str(first["id"])),  # `vllm serve FOLDER` calls it by its path
            root=PurePath(str(first["root"])).name if first.get("root") else None,
            probes=tuple(probe for _, probes in found for probe in probes),
        )

    def _tokenized(self, text: str) -> list[int]:
        """The ids of an answer that came as text alone."""
        self.kind = "openai text"
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    async def _look_at(self, server: ServerClient) -> tuple[dict[str, Any], list[Probe]]:
        url = server.url
        card = served_model(await server.list_models(), self._settings.model, url)
        check_card(
            card, self._identity.source, self._identity.context, self._sampling.max_new_tokens, url
        )
        if self._by_name:
            check_name(card, self._identity.source, url)
        self._served[url] = str(card["id"])
        if isinstance(limit := card.get("max_model_len"), int):
            self._server_limit = min(limit, self._server_limit or limit)
        probes = await self._probe(server) if self._settings.verify_model else []
        if self.kind == "openai text":
            logger.warning(
                f"{url} returns text without token ids: answers are tokenized here, so that their lengths may differ by a few "
                "tokens, and the served model is known by its name alone"
            )
            return card, []
        if not probes:
            logger.warning(
                f"{url}: the served model is not compared with the model to be compressed (verify_model: false)"
            )
        elif self._evaluates:
            logger.info(f"{url}: the served model is known by its name alone")
        elif self._model is None:
            logger.info(
                f"{url}: greedy tokens are kept in the store, to be compared when the model is in memory"
            )
        else:
            await asyncio.to_thread(check_probes, self._model, probes, url)
        return card, probes

    async def _probe(self, server: ServerClient) -> list[Probe]:
        prompts = [
            tuple(render_question(self._tokenizer, q, self._sampling)) for q in PROBE_QUESTIONS
        ]
        requests = [Request(ids, PROBE_TOKENS, 0, self._eos) for ids in prompts]
        tries = self._settings.tries
        try:
            answers = await asyncio.gather(
                *(self._ask(server, r, PROBE_SAMPLING, tries) for r in requests)
            )
        except (GaveUpError, RefusedError) as error:
            raise RacError(
                f"{server.url} does not answer a short greedy prompt: {error}"
            ) from error
        return [
            Probe(prompt_ids=ids, completion_ids=one.ids)
            for ids, one in zip(prompts, answers, strict=True)
        ]

    async def _complete(self, prompt: Prompt) -> Generation | Failure:
        length, limit, context = (
            len(prompt.ids),
            self._sampling.max_new_tokens,
            self._identity.context,
        )
        if context is not None and length + limit > context:
            warn_of_cap(limit, context)
            limit = context - length
            if limit < 1:
                return Failure(
                    f"the prompt of {length} tokens fills the model's context of {context}"
                )
        if self._server_limit is not None and length + limit > self._server_limit:
            return Failure(
                f"a prompt of {length} and a completion of up to {limit} tokens do not fit the servers' --max-model-len of "
                f"{self._server_limit}; serve with a larger one"
            )
        request = Request(prompt.ids, limit, trace_seed(self._sampling.seed, prompt.key), self._eos)
        async with self._places:
            return await self._ask_any(request)

    async def _ask_any(self, request: Request) -> Generation | Failure:
        """Ask one server after the other, until one completes the prompt."""
        reason = ""
        for tries in self._rounds:
            tried: list[ServerClient] = []
            while (server := least_busy(self._servers, tried)) is not None:
                tried.append(server)
                try:
                    return await self._ask(server, request, self._sampling, tries)
                except RefusedError as error:
                    return Failure(str(error))
                except GaveUpError as error:
                    reason = str(error)
        where = f" at each of {len(self._servers)} servers" if len(self._servers) > 1 else ""
        return Failure(f"{reason} (tried {self._settings.tries} times{where})")

    async def _ask(
        self, server: ServerClient, request: Request, sampling: SamplingSettings, tries: int
    ) -> Generation:
        return await server.complete(
            request,
            model=self._served[server.url],
            vocab_size=self._identity.vocab_size,
            sampling=sampling,
            tries=tries,
        )


def least_busy(
    servers: Sequence[ServerClient], tried: Collection[ServerClient] = ()
) -> ServerClient | None:
    """The server with the fewest completions under way, of those not tried yet; None if all were.

    A server that fails at once always has few under way and would be given every prompt. So a failing server is given one prompt
    at a time, as long as there is another server; its first success ends that.
    """
    return min(
        (server for server in servers if server not in tried),
        key=lambda server: (server.failing and server.under_way > 0, server.under_way),
        default=None,
    )
