"""The engine on OpenAI-compatible servers: concurrent completions on one or several."""

import asyncio
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain, islice
from pathlib import PurePath
from queue import SimpleQueue

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.errors import RacError, refusing
from rac_modifier.runtime.files import public_name
from rac_modifier.sampling.completions_api import (
    PROBE_QUESTIONS,
    PROBE_SAMPLING,
    PROBE_TOKENS,
    RefusedError,
    Request,
    ServedModel,
    UnavailableError,
    UnusableError,
    check_probes,
    trace_seed,
)
from rac_modifier.sampling.engine import (
    Completions,
    EngineKind,
    EngineRecord,
    Failure,
    InProcessEngine,
    Probe,
    Prompt,
)
from rac_modifier.sampling.generate import Generation, eos_token_ids, render_question
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.sampling.server_client import ServerClient, ask
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings


class ServerEngine:
    """Completes prompts, sent as token ids, on one or several servers of the model `identity`.

    Their greedy tokens are compared with `model`, if it is in memory and nothing is evaluated.
    """

    kind: EngineKind = "openai"
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
        self._settings, self._identity, self._tokenizer = settings, identity, tokenizer
        self._sampling, self._model, self._evaluates = sampling, model, evaluates
        self._eos = tuple(eos_token_ids(identity, tokenizer))
        self._servers = [ServerClient(url, settings) for url in settings.base_urls]
        self._server_limit: int | None = None  # the shortest max_model_len
        self._record: EngineRecord | None = None
        # The event loop has a thread of its own: it runs on while traces are written, and a
        # notebook already has a loop in its main thread.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="trace-servers", daemon=True
        )
        self._thread.start()

    def connect(self) -> EngineRecord:
        """Ask each server once which model it serves, and compare that with ours (RacError)."""
        if self._record is None:
            self._record = asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result()
        return self._record

    def iter_completions(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[Completions]:
        """Complete prompts, `concurrency` at a time, and yield them as they finish.

        Batches are taken in the caller's thread, only when they can be worked on.
        """
        prompts = chain.from_iterable(batches)
        under_way: dict[Future[Generation | Failure], Prompt] = {}
        ended: SimpleQueue[Future[Generation | Failure]] = SimpleQueue()
        while True:
            for prompt in islice(prompts, self._settings.concurrency - len(under_way)):
                future = asyncio.run_coroutine_threadsafe(self._complete(prompt), self._loop)
                under_way[future] = prompt
                future.add_done_callback(ended.put)
            if not under_way:
                return
            futures = [ended.get()]
            while not ended.empty():
                futures.append(ended.get())
            completions: list[tuple[Prompt, Generation | Failure]] = []
            stop: RacError | None = None
            for future in futures:
                try:
                    completions.append((under_way.pop(future), future.result()))
                except RacError as error:
                    stop = error
            if completions:
                yield completions
            if stop is not None:
                raise stop

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
        settings, cards, probes = self._settings, [], []
        for server in self._servers:
            url = server.url
            served = ServedModel.of(await server.list_models(), settings.model, url)
            served.check_limit(self._identity.context, self._sampling.max_new_tokens)
            card = served.card
            compares = self._evaluates or settings.verify_model
            if compares and self._model is None and settings.model is None:
                served.check_name(self._identity.source)
            server.model = str(card["id"])
            if isinstance(limit := card.get("max_model_len"), int):
                self._server_limit = min(limit, self._server_limit or limit)
            cards.append(card)
            if settings.verify_model:
                probes += await self._probe(server)
        root = cards[0].get("root")
        return EngineRecord(
            kind=self.kind,
            served_model=public_name(str(cards[0]["id"])),  # `vllm serve FOLDER`: the id is a path
            root=PurePath(str(root)).name if root else None,
            probes=tuple(probes),
        )

    async def _probe(self, server: ServerClient) -> list[Probe]:
        """Return greedy tokens of the server, compared with the model if that is in memory."""
        requests = []
        for question in PROBE_QUESTIONS:
            ids = render_question(self._tokenizer, question, self._sampling)
            requests.append(Request(tuple(ids), PROBE_TOKENS, 0, self._eos))
        problem = f"{server.url} does not answer a short greedy prompt"
        with refusing(problem, "look at the server's log", UnusableError, RefusedError):
            answers = await asyncio.gather(
                *(self._ask([server], request, PROBE_SAMPLING) for request in requests)
            )
        probes = [
            Probe(prompt_ids=request.prompt_ids, completion_ids=answer.ids)
            for request, answer in zip(requests, answers, strict=True)
        ]
        if self._model is not None and not self._evaluates:
            await asyncio.to_thread(check_probes, self._model, probes, server.url)
        return probes

    async def _complete(self, prompt: Prompt) -> Generation | Failure:
        length, limit = len(prompt.ids), self._sampling.max_new_tokens
        context, server_limit = self._identity.context, self._server_limit
        if context is not None and length >= context:
            return Failure(f"the prompt of {length} tokens fills the model's context of {context}")
        if context is not None:
            limit = min(limit, context - length)
        if server_limit is not None and length + limit > server_limit:
            return Failure(
                f"a prompt of {length} and a completion of up to {limit} tokens do not fit the "
                f"servers' --max-model-len of {server_limit}; serve with a larger one (with "
                "--serve: in RAC_VLLM_OPTIONS)"
            )
        request = Request(prompt.ids, limit, trace_seed(self._sampling.seed, prompt.key), self._eos)
        try:
            return await self._ask(self._servers, request, self._sampling)
        except (UnusableError, RefusedError) as error:
            return Failure(str(error), of_servers=isinstance(error, UnavailableError))

    async def _ask(
        self, servers: Sequence[ServerClient], request: Request, sampling: SamplingSettings
    ) -> Generation:
        def read(content: bytes, url: str) -> Generation:
            return request.read(content, self._identity.vocab_size, url)

        tokens = len(request.prompt_ids) + request.max_tokens
        return await ask(servers, "/completions", request.body(sampling), tokens, read)


Engine = ServerEngine | InProcessEngine


def engine_for(
    settings: EngineSettings | None,
    identity: ModelIdentity,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingSettings,
    evaluates: bool = False,
) -> Engine:
    """Return an engine on the servers of `settings`, or on the model in memory.

    `sampling` must be resolved. Answers that are evaluated come from a model that may differ.
    """
    if settings is not None:
        return ServerEngine(settings, identity, tokenizer, sampling, model, evaluates)
    if model is None:
        raise RacError("the model is not in memory: load it, or name servers that sample it")
    return InProcessEngine(model, tokenizer, sampling)
