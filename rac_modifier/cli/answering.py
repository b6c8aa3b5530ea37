"""Who answers the problems of `rac eval`: servers, a server that is started, or this process."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from rac_modifier.cli.models import load_on_accelerator, resolve, subject_of
from rac_modifier.cli.options import Dtype, resumable

if TYPE_CHECKING:
    from rac_modifier.cli.eval_options import EvalOptions
    from rac_modifier.evaluation.results import EvalResult
    from rac_modifier.problems.source import Problem
    from rac_modifier.settings.sampling import EngineSettings, SamplingSettings

API_KEY = "OPENAI_API_KEY"  # as in OpenAI's own client
_TIMEOUT = 600.0  # seconds per answer, at least
_SECONDS_PER_TOKEN = 0.25  # of one answer among many, on a slow server


@contextmanager
def own_server(
    model: str, precision: Dtype, concurrency: int, cap: int
) -> Iterator[EngineSettings]:
    """Run `vllm serve` with the model in the context; an answer has at most `cap` tokens."""
    from rac_modifier.sampling.own_server import VllmCommand

    with VllmCommand.from_environment().serve(resolve(model), precision) as url:
        yield engine_of((url,), concurrency, cap)


def engine_of(
    urls: Sequence[str], concurrency: int, cap: int, served_as: str | None = None
) -> EngineSettings:
    """Return the settings of servers whose answers have at most `cap` tokens."""
    from rac_modifier.settings.check import check_settings
    from rac_modifier.settings.sampling import EngineSettings

    values = {
        "base_urls": urls,
        "model": served_as,
        "concurrency": concurrency,
        "timeout": max(_TIMEOUT, cap * _SECONDS_PER_TOKEN),
        "api_key_env": API_KEY if os.environ.get(API_KEY) else None,
    }
    return check_settings(EngineSettings, values, "--server")


def ask(
    asked: EvalOptions, problems: Sequence[Problem], sampling: SamplingSettings
) -> list[EvalResult]:
    """Evaluate the models, or without models the servers."""
    with resumable("the answers so far are kept; run the same command again to go on"):
        if asked.models:
            return [_ask_model(name, asked, problems, sampling) for name in asked.models]
        return _ask_servers(asked, problems, sampling)


def _ask_model(
    name: str, asked: EvalOptions, problems: Sequence[Problem], sampling: SamplingSettings
) -> EvalResult:
    from rac_modifier.evaluation.accuracy import evaluate

    engine: AbstractContextManager[EngineSettings | None] = nullcontext()
    if asked.serve:
        engine = own_server(name, asked.precision, asked.concurrency, asked.cap)
    elif asked.server:
        engine = nullcontext(
            engine_of(asked.server, asked.concurrency, asked.cap, *asked.served_as)
        )
    served = asked.serve or asked.server
    model = subject_of(name) if served else load_on_accelerator(name, asked.precision)
    setup = _setup_of(name, asked) if served else None
    with engine as settings:
        return evaluate(
            *model,
            problems,
            label=name,
            source=asked.problem_source,
            sampling=sampling,
            path=asked.answers,
            engine=settings,
            setup=setup,
            verifier=asked.verifier,
        )


def _setup_of(name: str, asked: EvalOptions) -> str:
    """Return a hash of what decides how servers run the model."""
    from transformers.utils.hub import cached_file

    from rac_modifier.formats.quantization_config import (
        CONFIG_FILE,
        QUANTIZATION_KEY,
        SparsityRecord,
    )
    from rac_modifier.runtime.files import read_json

    if asked.serve:
        variables = [os.environ.get(key, "") for key in ("RAC_VLLM_OPTIONS", "RAC_KERNEL")]
        setup = [asked.precision, *variables]
    else:
        setup = [*sorted(engine_of(asked.server, 1, 1).base_urls), *asked.served_as]
    config = read_json(cached_file(resolve(name), CONFIG_FILE) or "")
    decides = [setup, SparsityRecord.of(config).int8_activations]
    if quantization := config.get(QUANTIZATION_KEY):  # of the key-value cache: no weight has it
        decides.append(quantization)
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]


def _ask_servers(
    asked: EvalOptions, problems: Sequence[Problem], sampling: SamplingSettings
) -> list[EvalResult]:
    from rac_modifier.evaluation.chat import evaluate_chat

    names: Sequence[str | None] = asked.served_as or [None] * len(asked.server)
    results = []
    for url, name in zip(asked.server, names, strict=True):
        engine = engine_of((url,), asked.concurrency, asked.cap, name)
        results.append(
            evaluate_chat(
                problems,
                engine=engine,
                sampling=sampling,
                path=asked.answers,
                verifier=asked.verifier,
            )
        )
    if len({result.label for result in results}) == len(results):
        return results
    pairs = zip(results, asked.server, strict=True)
    return [r.model_copy(update={"label": f"{r.label} at {url}"}) for r, url in pairs]
