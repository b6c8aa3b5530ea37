"""Evaluate a server that is known by address and name alone: no model folder, no tokenizer.

Each answer is appended to a file as it arrives, so that a killed evaluation goes on. At the end the
file is rewritten in the order of the problems: kills do not change it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from loguru import logger
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from rac_modifier.errors import RacError
from rac_modifier.evaluation.accuracy import check_problems, row_of_text
from rac_modifier.evaluation.results import EvalResult, summarise
from rac_modifier.files import lock, public_name, write_text_atomic
from rac_modifier.problems.answers import Verifier
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.chat_api import ChatAnswer, chat_body, read_chat
from rac_modifier.sampling.completions_api import (
    RefusedError,
    UnusableError,
    check_limit,
    served_model,
)
from rac_modifier.sampling.server_client import ServerClient, ask
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings

_FAILURES_OF_AN_OUTAGE = 16  # without an answer between them
_ANSWER = TypeAdapter(ChatAnswer)


def evaluate_chat(
    problems: Sequence[Problem],
    *,
    engine: EngineSettings,
    source: ProblemSource,
    sampling: SamplingSettings,
    path: Path | None = None,
    verifiers: Mapping[str, Verifier] | None = None,
    progress: bool = True,
) -> EvalResult:
    """Measure what `evaluate` does, from the texts of a chat server and its token counts.

    Loops are counted in words. The result's label is the name under which the server has the model.

    Args:
        problems: each with an answer; ids distinct.
        engine: one server, and the name of the model there.
        source: where the problems come from; the file of answers is named after it.
        sampling: temperature, top-p, cap, seed, answers per problem, system prompt, thinking.
        path: the file of answers; default: in rac_answers/, named after server and settings.
        verifiers: by task name, a function that compares answers instead of math-verify.
        progress: show a bar.

    Raises:
        RacError: problems that cannot be graded; a file of other settings, damaged, or in use; a
            server that cannot be reached, counts no tokens, or left problems without an answer.
            Answers so far are kept.
    """
    check_problems(problems, verifiers or {})
    started = time.monotonic()
    run = _ChatRun(problems, engine, source, sampling, path)
    answers, generated = asyncio.run(run.answers(progress))
    seconds = time.monotonic() - started
    rows = []
    for problem in problems:
        verifier = (verifiers or {}).get(problem.task or "")
        for i in range(sampling.samples_per_problem):
            answer = answers[f"{problem.id}#{i}"]
            row = row_of_text(
                problem,
                answer.text,
                verifier,
                finish=answer.finish_reason,
                tokens=answer.tokens,
                thinking_tokens=answer.thinking_tokens,
            )
            rows.append(row)
    return summarise(
        rows,
        label=run.label,
        seconds=seconds,
        cap=sampling.max_new_tokens,
        temperature=sampling.temperature or 0.0,
        seed=sampling.seed,
        generated=generated,
    )


class _ChatRun:
    """Asks one server all problems; `label` is known after `answers`."""

    label = ""

    def __init__(
        self,
        problems: Sequence[Problem],
        engine: EngineSettings,
        source: ProblemSource,
        sampling: SamplingSettings,
        path: Path | None,
    ):
        self._engine, self._source, self._sampling = engine, source, sampling
        self._path = path
        self._questions = {
            f"{problem.id}#{i}": problem.question
            for problem in problems
            for i in range(sampling.samples_per_problem)
        }

    async def answers(self, progress: bool) -> tuple[dict[str, ChatAnswer], int]:
        """Return the answers by "<problem id>#<sample>", and the tokens of this run."""
        server = ServerClient(self._engine.base_urls[0], self._engine)
        try:
            card = served_model(await server.list_models(), self._engine.model, server.url)
            check_limit(card, None, self._sampling.max_new_tokens, server.url)
            server.model = str(card["id"])
            self.label = public_name(server.model)
            header: dict[str, Any] = {
                "server": server.url,
                "model": self.label,
                "sampling": self._sampling.model_dump(exclude={"batch_size"}),
                "problems": self._source.model_dump(exclude={"limit"}),
            }
            header = json.loads(_line(header))  # as it is read back
            path = self._path or _default_path(header)
            file, stored = _open_answers(path, header)
            with file:
                fresh = await self._ask_missing(server, file, stored, progress)
                ordered = {key: stored[key] for key in self._questions} | stored
                lines = (_line({"id": key, **asdict(a)}) for key, a in ordered.items())
                write_text_atomic(path, _line(header) + "".join(lines))
            return stored, fresh
        finally:
            await server.close()

    async def _ask_missing(
        self,
        server: ServerClient,
        file: BinaryIO,
        stored: dict[str, ChatAnswer],
        progress: bool,
    ) -> int:
        """Add the missing answers to `stored` and to the file; return their tokens."""
        missing = [key for key in self._questions if key not in stored]
        if len(stored):
            logger.info(f"{file.name} holds {len(stored)} answers already: going on from there")
        failed: dict[str, str] = {}
        in_a_row, tokens, queue = 0, 0, iter(missing)
        bar = tqdm(total=len(missing), desc=self.label, unit="answer", disable=not progress or None)

        async def work() -> None:
            nonlocal in_a_row, tokens
            for key in queue:
                try:
                    answer = await self._ask(server, key)
                except (UnusableError, RefusedError) as error:
                    failed[key], in_a_row = str(error), in_a_row + 1
                    if in_a_row == _FAILURES_OF_AN_OUTAGE:
                        raise RacError(
                            f"{in_a_row} answers in a row failed, the last one: {error}. Answers "
                            f"so far are kept in {file.name}; see to the server, then run again"
                        ) from error
                    continue
                in_a_row = 0
                file.write(_line({"id": key, **asdict(answer)}).encode())
                file.flush()
                os.fsync(file.fileno())
                stored[key], tokens = answer, tokens + answer.tokens
                bar.update()

        with bar:
            await asyncio.gather(*(work() for _ in range(self._engine.concurrency)))
        if failed:
            key, reason = next(iter(failed.items()))
            raise RacError(
                f"{len(failed)} of {len(self._questions)} answers are missing (the first: "
                f"{key!r}, {reason}); answers so far are kept in {file.name}: run again to "
                "ask for the others"
            )
        return tokens

    async def _ask(self, server: ServerClient, key: str) -> ChatAnswer:
        question, cap = self._questions[key], self._sampling.max_new_tokens
        body = chat_body(question, key, self._sampling)

        def read(content: bytes, url: str) -> ChatAnswer:
            return read_chat(content, cap, url)

        return await ask([server], "/chat/completions", body, len(question) + cap, read)


def _default_path(header: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(_line(header).encode()).hexdigest()
    return Path("rac_answers") / f"chat-{digest[:12]}.jsonl"


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True) + "\n"


def _open_answers(path: Path, header: Mapping[str, Any]) -> tuple[BinaryIO, dict[str, ChatAnswer]]:
    """Open, lock and read a file of answers; a line that a kill cut is removed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise RacError(
            f"{path} cannot be opened ({error.strerror}); name a file that can be written"
        ) from error
    try:
        if not lock(file.fileno(), path, 0.0):
            raise RacError(f"{path} is in use by another evaluation; wait for it to end")
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        stored = _read_answers(path, whole or content, header)
        file.truncate(len(whole))
        if not whole:
            file.write(_line(header).encode())
            file.flush()
    except BaseException:
        file.close()
        raise
    return file, stored


def _read_answers(path: Path, content: bytes, header: Mapping[str, Any]) -> dict[str, ChatAnswer]:
    """Return the answers by id (RacError: other settings, or a damaged line)."""
    if not content:
        return {}
    first, *lines = content.splitlines()
    try:
        recorded = json.loads(first)
        different = [name for name in header if recorded[name] != header[name]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RacError(f"{path} is no file of chat answers; name another file") from error
    if different:
        name = different[0]
        raise RacError(
            f"{path} holds answers under other settings ({name}: {recorded[name]} there, "
            f"{header[name]} asked for); name another file"
        )
    stored = {}
    for number, line in enumerate(lines, 2):
        try:
            fields = json.loads(line)
            stored[str(fields.pop("id"))] = _ANSWER.validate_python(fields)
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            ValidationError,
        ) as e:
            raise RacError(f"{path}: line {number} is damaged; remove that line") from e
    return stored
