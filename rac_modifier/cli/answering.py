"""The part of `rac eval` that keeps answers in a file: servers, several answers per problem."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rac_modifier.cli.models import load_on_accelerator, resolve, subject_of
from rac_modifier.cli.options import Dtype, resumable
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.evaluation.results import EvalResult
    from rac_modifier.problems.answers import Verifier
    from rac_modifier.problems.source import Problem
    from rac_modifier.settings.sampling import EngineSettings, PromptSettings

_TIMEOUT = 600.0  # seconds per answer, at least
_SECONDS_PER_TOKEN = 0.25  # of one answer among many, on a slow server


@contextmanager
def own_server(
    model: str, precision: Dtype, concurrency: int, cap: int
) -> Iterator[EngineSettings]:
    """Start `vllm serve` with the model; it ends with the context. Answers have `cap` tokens at most."""
    from rac_modifier.sampling.own_server import VllmCommand, vllm_server

    with vllm_server(VllmCommand.from_environment(), resolve(model), precision.value) as url:
        yield engine_of((url,), concurrency, cap)


def engine_of(
    urls: tuple[str, ...], concurrency: int, cap: int, served_as: str | None = None
) -> EngineSettings:
    """Return the settings of servers whose answers have at most `cap` tokens."""
    from rac_modifier.settings.check import check_settings
    from rac_modifier.settings.sampling import EngineSettings

    timeout = max(_TIMEOUT, cap * _SECONDS_PER_TOKEN)
    values = {"model": served_as, "concurrency": concurrency, "timeout": timeout}
    return check_settings(EngineSettings, {"base_urls": urls, **values}, "--server")


@dataclass(frozen=True)
class Answering:
    """What the options of `rac eval` say of servers and of the file of answers.

    `samples` are answers per problem; `serve` starts a server; `served_as` is the servers' name of
    the model.
    """

    servers: tuple[str, ...]
    concurrency: int
    samples: int
    path: Path | None
    serve: bool = False
    served_as: str | None = None

    @property
    def served(self) -> bool:
        """Whether a server answers, and not the model in this process."""
        return self.serve or bool(self.servers)

    @property
    def keeps_answers(self) -> bool:
        """Whether answers go through a file."""
        return self.served or self.path is not None or self.samples > 1

    def check(
        self,
        models: Sequence[str],
        *,
        divergence: bool,
        temperature: float | None,
        written: Collection[str] = (),
    ) -> None:
        """Refuse what has no effect or cannot be, before anything is loaded (RacError).

        `written`: the names of the options that the user wrote.
        """
        one_model = bool(self.servers) or self.path is not None
        for holds, message in (
            (
                "concurrency" in written and not self.served,
                f"--concurrency {self.concurrency} is for --server and --serve; leave it out, or "
                "set --batch-size",
            ),
            (
                "batch_size" in written and self.served,
                "--batch-size is for a model in this process; leave it out, or set --concurrency",
            ),
            (
                "precision" in written and bool(self.servers),
                "--precision is for a model that is loaded here, and a server has one loaded; "
                "leave it out",
            ),
            (
                self.served_as is not None and not self.servers,
                f"--served-as {self.served_as} is for --server; leave it out",
            ),
            (
                divergence and self.keeps_answers,
                "--divergence asks the model in this process once per problem; leave --server, "
                "--serve, --samples, --answers out",
            ),
            (
                self.serve and bool(self.servers),
                f"--serve starts a server, and --server {', '.join(self.servers)} names one; leave "
                "one of them out",
            ),
            (
                len(models) > 1 and one_model,
                f"{len(models)} models are named, and --server and --answers are for one; evaluate "
                "each alone, the dense one with --json FILE, the others with --baseline FILE",
            ),
            (
                self.samples > 1 and not temperature,
                f"--samples {self.samples} at temperature 0 are the same answer; give "
                "--temperature 0.6",
            ),
        ):
            if holds:
                raise RacError(message)
        if self.servers:
            engine_of(self.servers, self.concurrency, 1, self.served_as)
        if self.serve:
            from rac_modifier.sampling.own_server import VllmCommand

            VllmCommand.from_environment()

    def run(
        self,
        name: str,
        problems: Sequence[Problem],
        source: Mapping[str, Any],
        limits: Mapping[str, Any],
        prompt: PromptSettings,
        precision: Dtype,
        verifiers: Mapping[str, Verifier],
    ) -> EvalResult:
        """Evaluate the model `name`.

        `source` holds the fields of `ProblemSource`, `limits` cap, temperature, top-p, batch size
        and seed; `verifiers` compare the answers of a task.
        """
        from rac_modifier.evaluation.accuracy import evaluate_into_file
        from rac_modifier.settings.problems import ProblemSource
        from rac_modifier.settings.sampling import SamplingSettings

        model, tokenizer = subject_of(name) if self.served else load_on_accelerator(name, precision)
        sampling = SamplingSettings(
            top_k=0, samples_per_problem=self.samples, **limits, **prompt.model_dump()
        )
        interrupted = resumable("the answers so far are kept; run the same command again to go on")
        with interrupted, self.engine(name, precision, sampling.max_new_tokens) as engine:
            return evaluate_into_file(
                model,
                tokenizer,
                problems,
                label=name,
                source=ProblemSource(**source),
                sampling=sampling,
                path=self.path,
                engine=engine,
                verifiers=verifiers,
            )

    @contextmanager
    def engine(self, name: str, precision: Dtype, cap: int) -> Iterator[EngineSettings | None]:
        """Yield the servers that are asked; None: the model in this process."""
        if self.serve:
            with own_server(name, precision, self.concurrency, cap) as engine:
                yield engine
        elif self.servers:
            yield engine_of(self.servers, self.concurrency, cap, self.served_as)
        else:
            yield None
