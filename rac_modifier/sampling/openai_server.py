"""The engine on OpenAI-compatible servers: many completions under way, over one or several servers."""

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
from rac_modifier.files import public_name
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
    check_limit,
    check_name,
    check_probes,
    served_model,
)
from rac_modifier.sampling.prompts import render_question
from rac_modifier.sampling.server_client import GaveUpError, RefusedError, ServerClient
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings

# With several servers, tries at each before the next one: a server that hangs holds nothing up.
_TRIES_BEFORE_ANOTHER = 2
TRIES = 9  # requests per completion, after which its problem counts as failed
# Prompts are taken up to this many times the concurrency ahead of the oldest unfinished one. That
# keeps the servers busy during one long completion, and bounds the finished ones in memory.
_LOOK_AHEAD = 4
# For every eight prompts under way one more is ready: it is sent while traces are being written.
_READY = 8

_UnderWay = dict[Future[Generation | Failure], tuple[int, Prompt]]  # number of the prompt, prompt


class ServerEngine:
    """Completes prompts, sent as token ids, on one or several servers.

    Without the weights in memory, the name of what a server loaded is compared with the model's name,
    unless `settings.model` names it, or traces are sampled with `verify_model: false`.

    Args:
        settings: which servers, and how many completions at the same time.
        identity: the model that the servers must serve.
        tokenizer: of that model, for EOS and for the prompts of the check.
        sampling: resolved settings.
        model: the model itself if it is in memory; greedy tokens of the servers are compared with it.
        evaluates: answers are judged, and nothing is calibrated on them. Then servers that return no
            token ids are accepted if `verify_model` is set, and `kind` becomes "openai text".
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
        self._sampling, self._model, self._evaluates = sampling, model, evaluates
        self._eos = identity.eos(tokenizer)
        tokenize = self._tokenized if evaluates and settings.verify_model else None
        self._servers = [ServerClient(url, settings, tokenize) for url in settings.base_urls]
        if settings.api_key_env is not None:
            logger.warning(
                f"the key in {settings.api_key_env} is sent to {', '.join(settings.base_urls)}"
            )
        self._served: dict[str, str] = {}  # by url, the name of the model there
        self._server_limit: int | None = None  # the shortest max_model_len
        self._places = asyncio.Semaphore(settings.concurrency)
        self._record: EngineRecord | None = None
        # The event loop has a thread of its own: it runs on while traces are written, and a
        # notebook already has a loop in its main thread.
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
        """Complete prompts, `concurrency` at a time. Call `connect` first.

        Raises:
            RacError: a server wants a key, does not return token ids, or the like.
        """
        prompts = chain.from_iterable(batches)
        under_way: _UnderWay = {}  # the oldest first
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

    def _has_room(self, under_way: _UnderWay, taken: int) -> bool:
        oldest = next(iter(under_way.values()))[0] if under_way else taken
        concurrency = self._settings.concurrency
        room = concurrency + concurrency // _READY
        return len(under_way) < room and taken - oldest < _LOOK_AHEAD * concurrency

    def close(self) -> None:
        """Drop the requests under way (a server notices) and end the thread."""
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
        cards, probes = [], []
        for server in self._servers:
            cards.append(await self._card(server))
            probes += await self._checked_probes(server)
        root = cards[0].get("root")
        return EngineRecord(
            kind=self.kind,
            served_model=public_name(str(cards[0]["id"])),  # `vllm serve FOLDER`: the id is a path
            root=PurePath(str(root)).name if root else None,
            probes=tuple(probes),
        )

    async def _card(self, server: ServerClient) -> dict[str, Any]:
        """Return the entry of the model in the server's list, once it has passed the checks."""
        url, identity = server.url, self._identity
        card = served_model(await server.list_models(), self._settings.model, url)
        check_limit(card, identity.context, self._sampling.max_new_tokens, url)
        asked = self._evaluates or self._settings.verify_model
        if asked and self._model is None and self._settings.model is None:
            check_name(card, identity.source, url)
        self._served[url] = str(card["id"])
        if isinstance(limit := card.get("max_model_len"), int):
            self._server_limit = min(limit, self._server_limit or limit)
        return card

    async def _checked_probes(self, server: ServerClient) -> list[Probe]:
        """Return greedy tokens of the server, compared with the model if that is in memory."""
        url = server.url
        if not self._settings.verify_model:
            logger.warning(
                f"{url}: the served model is not compared with the model to be compressed "
                "(verify_model: false)"
            )
            return []
        probes = await self._probe(server)
        if self.kind == "openai text":
            logger.warning(
                f"{url} returns text without token ids: answers are tokenized here, so that their "
                "lengths may differ by a few tokens, and the served model is known by its name alone"
            )
            return []
        if self._evaluates:
            logger.info(f"{url}: the served model is known by its name alone")
        elif self._model is None:
            logger.info(
                f"{url}: greedy tokens are stored, to be compared when the model is in memory"
            )
        else:
            await asyncio.to_thread(check_probes, self._model, probes, url)
        return probes

    async def _probe(self, server: ServerClient) -> list[Probe]:
        prompts = [
            tuple(render_question(self._tokenizer, question, self._sampling))
            for question in PROBE_QUESTIONS
        ]
        requests = [Request(ids, PROBE_TOKENS, 0, self._eos) for ids in prompts]
        try:
            answers = await asyncio.gather(
                *(self._ask(server, request, PROBE_SAMPLING, TRIES) for request in requests)
            )
        except (GaveUpError, RefusedError) as error:
            raise RacError(
                f"{server.url} does not answer a short greedy prompt: {error}"
            ) from error
        return [
            Probe(prompt_ids=ids, completion_ids=answer.ids)
            for ids, answer in zip(prompts, answers, strict=True)
        ]

    def _tokenized(self, text: str) -> list[int]:
        """Return the ids of an answer that came as text alone."""
        self.kind = "openai text"
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    async def _complete(self, prompt: Prompt) -> Generation | Failure:
        length, limit = len(prompt.ids), self._sampling.max_new_tokens
        context, server_limit = self._identity.context, self._server_limit
        if context is not None and length + limit > context:
            warn_of_cap(limit, context)
            limit = context - length
            if limit < 1:
                return Failure(
                    f"the prompt of {length} tokens fills the model's context of {context}"
                )
        if server_limit is not None and length + limit > server_limit:
            return Failure(
                f"a prompt of {length} and a completion of up to {limit} tokens do not fit the "
                f"servers' --max-model-len of {server_limit}; serve with a larger one"
            )
        request = Request(prompt.ids, limit, trace_seed(self._sampling.seed, prompt.key), self._eos)
        async with self._places:
            return await self._ask_any(request)

    async def _ask_any(self, request: Request) -> Generation | Failure:
        """Ask one server after the other, until one completes the prompt.

        With several servers, each one gets a few tries first, and then its other tries.
        """
        reason, tries = "", TRIES
        first = min(_TRIES_BEFORE_ANOTHER, tries) if len(self._servers) > 1 else tries
        for count in filter(None, (first, tries - first)):
            tried: list[ServerClient] = []
            while (server := least_busy(self._servers, tried)) is not None:
                tried.append(server)
                try:
                    return await self._ask(server, request, self._sampling, count)
                except RefusedError as error:
                    return Failure(str(error))
                except GaveUpError as error:
                    reason = str(error)
        where = f" at each of {len(self._servers)} servers" if len(self._servers) > 1 else ""
        return Failure(f"{reason} (tried {tries} times{where})")

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
    """Return the server with the fewest completions under way; None if all were tried.

    A server that fails at once always has few under way and would get every prompt. So a failing
    server gets one prompt at a time while there is another server; its first success ends that.
    """
    return min(
        (server for server in servers if server not in tried),
        key=lambda server: (server.failing and server.under_way > 0, server.under_way),
        default=None,
    )
