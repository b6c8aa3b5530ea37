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
from typing import Any, BinaryIO, Self

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
from rac_modifier.sampling.completions_api import (
    RefusedError,
    UnusableError,
    only_choice,
    sampling_fields,
    trace_seed,
)
from rac_modifier.sampling.generate import FinishReason, messages_of, thinking_switches
from rac_modifier.sampling.server_client import ServerClient, ask
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings

_TEXTS = ("reasoning_content", "reasoning", "content")  # vLLM: the second
_MISCOUNT = 2  # tokens by which a server's count of a truncated answer may miss the cap


@dataclass(frozen=True)
class ChatAnswer:
    """An answer of a chat server; its thinking is a part of `text`, up to `</think>`."""

    text: str
    finish_reason: FinishReason
    tokens: int
    thinking_tokens: int
    only_thinking: bool = False  # the server returned its reasoning and no content

    @classmethod
    def read(cls, content: bytes, cap: int, server: str) -> Self:
        """Return the answer in a body with status 200.

        UnusableError for a field of a wrong type or range; RefusedError if the server hides its
        text, or truncated the answer before the cap; RacError if it does not count tokens.
        """
        choice, usage = only_choice(content)
        message, finish = choice.get("message"), choice.get("finish_reason")
        found = [message.get(n) for n in _TEXTS] if isinstance(message, dict) else [message, 0]
        texts = ["" if text is None else text for text in found]
        if not all(isinstance(text, str) for text in texts):
            raise UnusableError(f"message {str(message)[:80]!r} has no text in {', '.join(_TEXTS)}")
        thinking, reasoning, answer = map(str, texts)
        if finish not in ("stop", "length"):
            raise UnusableError(f"finish_reason {str(finish)[:60]!r} is neither stop nor length")
        tokens = usage.get("completion_tokens")
        if tokens is None:
            raise RacError(
                f"{server} counts no tokens (usage.completion_tokens is missing); name the "
                "model folder too, whose tokenizer counts them"
            )
        if type(tokens) is not int or not 0 <= tokens <= cap:
            raise UnusableError(
                f"usage.completion_tokens {str(tokens)[:60]!r} is no count of at most {cap}"
            )
        if finish == "length" and tokens < cap - _MISCOUNT:
            raise RefusedError(
                f"{server} truncated an answer at {tokens} of {cap} tokens; give it a larger "
                "context, or lower --cap"
            )
        details = usage.get("completion_tokens_details")
        counted = details.get("reasoning_tokens") if isinstance(details, dict) else None
        thinking = thinking or reasoning
        if not (thinking or answer) and tokens > 1:
            raise RefusedError(
                f"{server} returned {tokens} tokens without a text; let it return its reasoning"
            )
        # Thinking counts as closed if content follows it.
        text = thinking + THINK_END + answer if thinking and answer else thinking or answer
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written
        tokens = max(tokens, 1)
        before, tag, _ = text.partition(THINK_END)
        if not tag:
            counted = tokens
        elif type(counted) is not int or not 0 < counted <= tokens:
            counted = round(
                tokens * len(before + tag) / len(text)
            )  # without a count, by characters
        return cls(text, finish, tokens, counted, bool(thinking) and not answer)


def chat_body(question: str, key: str, sampling: SamplingSettings) -> dict[str, Any]:
    """Return the JSON of /v1/chat/completions without the model; `key` and the seed decide."""
    return {
        **sampling_fields(sampling, sampling.max_new_tokens, trace_seed(sampling.seed, key)),
        "messages": messages_of(question, sampling.system_prompt),
        "chat_template_kwargs": thinking_switches(sampling.thinking),
    }


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
