"""Evaluate a server that is known by address and name alone: no model folder, no tokenizer.

Each answer is appended to a file as it arrives, so that a killed evaluation goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from loguru import logger
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from rac_modifier.errors import RacError
from rac_modifier.evaluation.accuracy import check_problems, row_of_text
from rac_modifier.evaluation.results import EvalResult, summarise
from rac_modifier.files import lock, public_name
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


@dataclass(frozen=True)
class _Line(ChatAnswer):
    """A line of the file of answers, after the header."""

    id: str  # "<problem id>#<sample>"


_HEADER, _LINE = TypeAdapter(dict[str, Any]), TypeAdapter(_Line)


def evaluate_chat(
    problems: Sequence[Problem],
    *,
    engine: EngineSettings,
    source: ProblemSource,
    sampling: SamplingSettings,
    path: Path | None = None,
    verifiers: Mapping[str, Verifier] | None = None,
) -> EvalResult:
    """Measure what `evaluate` does, from the texts of a chat server and its token counts.

    Loops are counted in words. The result's label is the name under which the server has the model.
    `engine` holds one server; `path` is by default in rac_answers/, named after server and
    settings.

    Raises:
        RacError: what `evaluate` raises; a server that counts no tokens; a damaged file.
    """
    verifiers = verifiers or {}
    check_problems(problems, verifiers)
    samples = range(sampling.samples_per_problem)
    asked = {f"{problem.id}#{i}": problem for problem in problems for i in samples}
    started = time.monotonic()
    label, answers, tokens = asyncio.run(_answers(asked, engine, source, sampling, path))
    seconds = time.monotonic() - started
    rows = [
        row_of_text(
            problem,
            answers[key].text,
            verifiers.get(problem.task or ""),
            finish=answers[key].finish_reason,
            tokens=answers[key].tokens,
            thinking_tokens=answers[key].thinking_tokens,
        )
        for key, problem in asked.items()
    ]
    return summarise(
        rows,
        label=label,
        seconds=seconds,
        sampling=sampling,
        generated=tokens,
    )


async def _answers(
    asked: Mapping[str, Problem],
    engine: EngineSettings,
    source: ProblemSource,
    sampling: SamplingSettings,
    path: Path | None,
) -> tuple[str, dict[str, ChatAnswer], int]:
    """Return the model's public name, all answers by key, and the tokens of this run."""
    server = ServerClient(engine.base_urls[0], engine)
    try:
        card = served_model(await server.list_models(), engine.model, server.url)
        check_limit(card, None, sampling.max_new_tokens, server.url)
        server.model = str(card["id"])
        name = public_name(server.model)
        header = {
            "server": server.url,
            "model": name,
            "sampling": sampling.model_dump(exclude={"batch_size"}),
            "problems": source.model_dump(exclude={"limit"}),
        }
        digest = hashlib.sha256(_encoded(header)).hexdigest()
        path = path or Path("rac_answers") / f"chat-{digest[:12]}.jsonl"
        file, answers = _open_answers(path, header)
        with file:
            if answers:
                logger.info(f"{path} holds {len(answers)} answers already: going on from there")
            before = sum(answer.tokens for answer in answers.values())
            missing = {key: problem for key, problem in asked.items() if key not in answers}
            await _ask(server, missing, sampling, engine.concurrency, file, answers)
        tokens = sum(answer.tokens for answer in answers.values()) - before
        return name, answers, tokens
    finally:
        await server.close()


async def _ask(
    server: ServerClient,
    missing: Mapping[str, Problem],
    sampling: SamplingSettings,
    concurrency: int,
    file: BinaryIO,
    answers: dict[str, ChatAnswer],
) -> None:
    """Append the missing answers to the file, and add them to `answers`.

    Raises:
        RacError: an answer failed after all its tries.
    """
    cap, queue = sampling.max_new_tokens, iter(missing.items())

    def read(content: bytes, url: str) -> ChatAnswer:
        return read_chat(content, cap, url)

    async def work() -> None:
        for key, problem in queue:
            body = chat_body(problem.question, key, sampling)
            size = len(problem.question) + cap
            try:
                answer = await ask([server], "/chat/completions", body, size, read)
            except (UnusableError, RefusedError) as error:
                raise RacError(
                    f"the answer {key!r} is missing ({error}); answers so far are kept in "
                    f"{file.name}: see to the server, and run again to ask for the others"
                ) from error
            file.write(_encoded({"id": key, **asdict(answer)}))
            file.flush()
            os.fsync(file.fileno())
            answers[key] = answer
            bar.update()

    with tqdm(total=len(missing), desc=server.model, unit="answer", disable=None) as bar:
        await asyncio.gather(*(work() for _ in range(concurrency)))


def _encoded(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True) + "\n").encode()


def _open_answers(path: Path, header: Mapping[str, Any]) -> tuple[BinaryIO, dict[str, ChatAnswer]]:
    """Open, lock and read a file of answers; a line that a kill cut is removed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise RacError(
            f"{path} cannot be opened ({error.strerror}); name a file that can be written"
        ) from error
    with contextlib.ExitStack() as on_error:
        on_error.callback(file.close)
        if not lock(file.fileno(), path, 0.0):
            raise RacError(f"{path} is in use by another evaluation; wait for it to end")
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        answers = _read_answers(path, whole or content, _encoded(header))
        file.truncate(len(whole))
        if not whole:
            file.write(_encoded(header))
            file.flush()
        on_error.pop_all()
    return file, answers


def _read_answers(path: Path, content: bytes, header: bytes) -> dict[str, ChatAnswer]:
    """Return the answers by key (RacError: other settings, or a damaged line)."""
    recorded: dict[str, Any] = {}
    answers: dict[str, ChatAnswer] = {}
    for number, line in enumerate((content or header).splitlines(), 1):
        try:
            if number == 1:
                recorded = _HEADER.validate_json(line)
            else:
                answer = _LINE.validate_json(line)
                answers[answer.id] = answer
        except ValidationError as error:
            raise RacError(
                f"{path}: line {number} is not of a file of answers; name another file, or remove "
                "the line"
            ) from error
    for name, value in _HEADER.validate_json(header).items():
        if recorded.get(name) != value:
            raise RacError(
                f"{path} holds answers under other settings ({name}: {recorded.get(name)} there, "
                f"{value} asked for); name another file"
            )
    return answers
