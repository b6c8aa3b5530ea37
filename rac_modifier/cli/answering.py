"""Who answers the problems of `rac eval`: servers, a server that is started, or this process."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rac_modifier.cli.models import load_on_accelerator, resolve, subject_of
from rac_modifier.cli.options import Dtype, resumable
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.evaluation.results import EvalResult
    from rac_modifier.problems.source import Problem
    from rac_modifier.settings.problems import ProblemSource
    from rac_modifier.settings.sampling import EngineSettings

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
    urls: tuple[str, ...], concurrency: int, cap: int, served_as: str | None = None
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


@dataclass(frozen=True)
class Answering:
    """The options of `rac eval` about servers and the file of answers."""

    servers: tuple[str, ...]  # of one model; without a folder, each has one, the dense one first
    served_as: tuple[str, ...]  # the servers' names of the model or models
    serve: bool  # start a server for each model
    concurrency: int  # answers of a server in progress
    path: Path | None  # of the file of answers; None: in rac_answers/
    precision: Dtype  # of a model that is loaded or served here

    def check(self, models: Sequence[str], written: Set[str], *, divergence: bool) -> None:
        """Refuse contradictions, also among the options `written` by the user (RacError)."""
        served, count = bool(self.servers), len(self.served_as)
        on_servers = zip(self.servers, self.served_as or self.servers, strict=False)
        named: Sequence[object] = models or list(on_servers)
        contradictions = {
            "no model is named; give a model folder, a Hugging Face id, or --server URL": (
                not models and not served
            ),
            "--served-as names the model of a server; add --server URL, or leave it out": (
                count > 0 and not served
            ),
            "--served-as names several models; give the one of the model folder": (
                bool(models) and count > 1
            ),
            f"--served-as names {count} models for {len(self.servers)} servers; give one each": (
                not models and count not in (0, len(self.servers))
            ),
            "--card and --template need a model folder; leave them out": (
                not models and bool(written & {"card", "template"})
            ),
            "a model is named twice and would be compared with itself; leave it out, or name "
            "another (of one server: --served-as)": len(set(named)) < len(named),
            "--precision is for a model that is loaded here; leave it out with --server": (
                served and "precision" in written
            ),
            "--divergence asks the model in this process; leave --server and --serve out": (
                divergence and (self.serve or served)
            ),
            "--divergence compares with the first model named; leave --baseline out": (
                divergence and "baseline" in written
            ),
            "--serve starts a server, and --server names one; leave one of them out": (
                self.serve and served
            ),
            "--server and --answers are for one model; evaluate each alone, the dense one with "
            "--json FILE, the others with --baseline FILE": (
                len(models) > 1 and (served or self.path is not None)
            ),
        }
        if message := next((text for text, holds in contradictions.items() if holds), None):
            raise RacError(message)
        if served:
            engine_of(self.servers, self.concurrency, 1)
        if self.serve:
            from rac_modifier.sampling.own_server import VllmCommand

            VllmCommand.from_environment()

    def run(
        self, models: Sequence[str], problems: Sequence[Problem], source: ProblemSource, **how: Any
    ) -> list[EvalResult]:
        """Evaluate the models, or without models the servers; `how`: as `evaluate` takes it."""
        with resumable("the answers so far are kept; run the same command again to go on"):
            if models:
                return [self._ask_model(name, problems, source=source, **how) for name in models]
            return self._ask_servers(problems, **how)

    def _ask_model(self, name: str, problems: Sequence[Problem], **how: Any) -> EvalResult:
        from rac_modifier.evaluation.accuracy import evaluate

        cap = how["sampling"].max_new_tokens
        engine: AbstractContextManager[EngineSettings | None] = nullcontext()
        if self.serve:
            engine = own_server(name, self.precision, self.concurrency, cap)
        elif self.servers:
            engine = nullcontext(engine_of(self.servers, self.concurrency, cap, *self.served_as))
        served = self.serve or self.servers
        model = subject_of(name) if served else load_on_accelerator(name, self.precision)
        setup = self.setup_of(name) if served else None
        with engine as settings:
            how |= {"engine": settings, "setup": setup, "path": self.path}
            return evaluate(*model, problems, label=name, **how)

    def setup_of(self, name: str) -> str:
        """Return a hash of what decides how servers run the model."""
        from transformers.utils.hub import cached_file

        from rac_modifier.formats.quantization_config import (
            CONFIG_FILE,
            QUANTIZATION_KEY,
            SparsityRecord,
        )
        from rac_modifier.runtime.files import read_json

        if self.serve:
            variables = [os.environ.get(key, "") for key in ("RAC_VLLM_OPTIONS", "RAC_KERNEL")]
            setup = [self.precision, *variables]
        else:
            setup = [*sorted(engine_of(self.servers, 1, 1).base_urls), *self.served_as]
        config = read_json(cached_file(resolve(name), CONFIG_FILE) or "")
        decides = [setup, SparsityRecord.of(config).int8_activations]
        if quantization := config.get(QUANTIZATION_KEY):  # of the key-value cache: no weight has it
            decides.append(quantization)
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]

    def _ask_servers(self, problems: Sequence[Problem], **how: Any) -> list[EvalResult]:
        from rac_modifier.evaluation.chat import evaluate_chat

        names, cap = self.served_as or (None,) * len(self.servers), how["sampling"].max_new_tokens
        results = []
        for url, name in zip(self.servers, names, strict=True):
            engine = engine_of((url,), self.concurrency, cap, name)
            results.append(evaluate_chat(problems, engine=engine, path=self.path, **how))
        if len({result.label for result in results}) == len(results):
            return results
        pairs = zip(results, self.servers, strict=True)
        return [r.model_copy(update={"label": f"{r.label} at {url}"}) for r, url in pairs]
