"""Evaluate a server that is known by address and name alone: no model folder, no tokenizer.

Each answer is appended to a file as it arrives, so that a killed evaluation goes on.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from loguru import logger
from pydantic import TypeAdapter, ValidationError

from rac_modifier.errors import RacError, refusing
from rac_modifier.evaluation.results import EvalResult, check_problems
from rac_modifier.evaluation.stopping import row_of_text
from rac_modifier.problems.answers import THINK_END, Verifier
from rac_modifier.problems.source import Problem
from rac_modifier.runtime.files import lock, public_name
from rac_modifier.runtime.progress import Phase
from rac_modifier.sampling import completions_api
from rac_modifier.sampling.chat_api import ChatAnswer, chat_body
from rac_modifier.sampling.server_client import ServerClient, ask
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings


@dataclass(frozen=True, kw_only=True)
class _Line(ChatAnswer):
    """A line of the file of answers."""

    id: str  # "<problem id>#<sample>"
    asked: str  # a digest of server, model as the server describes it, sampling and question


_LINE = TypeAdapter(_Line)


def evaluate_chat(
    problems: Sequence[Problem],
    *,
    engine: EngineSettings,
    sampling: SamplingSettings,
    path: Path | None = None,
    verifier: Verifier | None = None,
) -> EvalResult:
    """Measure what `evaluate` does, from the texts of a chat server and its token counts.

    Loops are counted in words. The label is the server's name of the model.
    """
    check_problems(problems, verifier, ungraded=True)
    asked = [(problem, i) for problem in problems for i in range(sampling.samples_per_problem)]
    started = time.monotonic()
    label, answers, tokens = asyncio.run(_answers(asked, engine, sampling, path))
    seconds = time.monotonic() - started

    def thinks(answer: ChatAnswer) -> bool:
        return sampling.thinking or answer.only_thinking or THINK_END in answer.text

    rows = [
        row_of_text(
            problem,
            answer.text,
            verifier,
            finish=answer.finish_reason,
            tokens=answer.tokens,
            thinking_tokens=answer.thinking_tokens if thinks(answer) else 0,
        )
        for (problem, _), answer in zip(asked, answers, strict=True)
    ]
    return EvalResult.of(rows, label=label, seconds=seconds, sampling=sampling, generated=tokens)


async def _answers(
    asked: Sequence[tuple[Problem, int]],
    engine: EngineSettings,
    sampling: SamplingSettings,
    path: Path | None,
) -> tuple[str, list[ChatAnswer], int]:
    """Return the model's public name, the answers in order, and the tokens of this run."""
    server = ServerClient(engine.base_urls[0], engine)
    try:
        served = completions_api.ServedModel.of(
            await server.list_models(), engine.model, server.url
        )
        served.check_limit(None, sampling.max_new_tokens)
        card = served.card
        server.model = str(card["id"])
        name = public_name(server.model)
        # what the server loaded: vLLM gives its name as `root`, llama.cpp its size in `meta`
        loaded = [server.url, name, card.get("root"), card.get("meta")]
        settings = [*loaded, sampling.model_dump(exclude={"batch_size"})]
        keys = [_digest([*settings, problem.id, problem.question, i]) for problem, i in asked]
        path = path or Path("rac_answers") / f"chat-{_digest([server.url, name])[:12]}.jsonl"
        with _open_answers(path) as (file, answers):
            missing = {k: pair for k, pair in zip(keys, asked, strict=True) if k not in answers}
            if before := len(asked) - len(missing):
                logger.warning(
                    f"{path} holds {before} answers of {name} at {server.url} already: going on "
                    "from there; if another model answers there now, remove the file"
                )
            await _ask(server, missing, sampling, engine.concurrency, file, answers)
        tokens = sum(answers[key].tokens for key in missing)
        return name, [answers[key] for key in keys], tokens
    finally:
        await server.close()


async def _ask(
    server: ServerClient,
    missing: Mapping[str, tuple[Problem, int]],
    sampling: SamplingSettings,
    concurrency: int,
    file: BinaryIO,
    answers: dict[str, ChatAnswer],
) -> None:
    """Append the missing answers to the file, and add them to `answers`."""
    cap, queue = sampling.max_new_tokens, iter(missing.items())

    def read(content: bytes, url: str) -> ChatAnswer:
        return ChatAnswer.read(content, cap, url)

    async def work() -> None:
        for key, (problem, sample) in queue:
            name = f"{problem.id}#{sample}"
            body = chat_body(problem.question, name, sampling)
            size = len(problem.question) + cap
            try:
                answer = await ask([server], "/chat/completions", body, size, read)
            except (completions_api.UnusableError, completions_api.RefusedError) as error:
                raise RacError(
                    f"the answer {name!r} is missing ({error}); answers so far are kept in "
                    f"{file.name}: see to the server, and run again to ask for the others"
                ) from error
            line = {"id": name, "asked": key, **asdict(answer)}
            file.write((json.dumps(line, sort_keys=True) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            answers[key] = answer
            phase.advance()

    with Phase(f"asking {server.model}", len(missing), unit="answers") as phase:
        await asyncio.gather(*(work() for _ in range(concurrency)))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _open_answers(path: Path) -> Iterator[tuple[BinaryIO, dict[str, ChatAnswer]]]:
    """Open, lock and read a file of answers; a line that a kill cut is removed."""
    with refusing(f"{path} cannot be opened", "name a file that can be written", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    with file:
        if not lock(file.fileno(), path, 0.0):
            raise RacError(f"{path} is in use by another evaluation; wait for it to end")
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        answers: dict[str, ChatAnswer] = {}
        # a file without a whole line is not ours to cut
        for number, line in enumerate((whole or content).splitlines(), 1):
            try:
                answer = _LINE.validate_json(line)
            except ValidationError as error:
                raise RacError(
                    f"{path}: line {number} is no answer; name another file, or remove the line"
                ) from error
            answers[answer.asked] = answer
        file.truncate(len(whole))
        yield file, answers
