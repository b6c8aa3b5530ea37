"""The part of `rac eval` that keeps answers in a file: servers, several answers per problem, runs that go on after a kill."""

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


def timeout_of(cap: int) -> float:
    """Seconds that an answer of at most `cap` tokens has, before it is asked for again."""
    return max(_TIMEOUT, cap * _SECONDS_PER_TOKEN)


@dataclass(frozen=True)
class Answering:
    """What the options say: addresses of servers, answers in progress at once and per problem, file, a server of our own.

    `served_as`: what the servers call the model.
    """

    servers: tuple[str, ...]
    concurrency: int
    samples: int
    path: Path | None
    serve: bool = False
    served_as: str | None = None

    @property
    def keeps_answers(self) -> bool:
        """Whether answers go through a file."""
        return self.served or self.path is not None or self.samples > 1

    @property
    def served(self) -> bool:
        """Whether a server answers, and not the model in this process."""
        return self.serve or bool(self.servers)

    def check(
        self,
        models: Sequence[str],
        *,
        divergence: bool,
        temperature: float | None,
        written: Collection[str] = (),
    ) -> None:
        """Refuse what has no effect or cannot be, before anything is loaded (RacError).

        Args:
            models: as the user wrote them.
            divergence, temperature: the options of these names.
            written: names of the options that the user wrote.
        """
        if "concurrency" in written and not self.served:
            raise RacError(
                f"--concurrency {self.concurrency} is for --server and --serve; leave it out, or set --batch-size"
            )
        if "batch_size" in written and self.served:
            raise RacError(
                "--batch-size is for a model in this process; leave it out, or set --concurrency"
            )
        if "precision" in written and self.servers:
            raise RacError(
                "--precision is for a model that is loaded here, and a server has one loaded; leave it out"
            )
        if self.served_as is not None and not self.servers:
            raise RacError(f"--served-as {self.served_as} is for --server; leave it out")
        if not self.keeps_answers:
            return
        if divergence:
            raise RacError(
                "--divergence asks the model in this process once per problem; leave --server, --serve, --samples, --answers out"
            )
        if self.serve and self.servers:
            raise RacError(
                f"--serve starts a server, and --server {self.servers[0]} names one; leave one of them out"
            )
        if len(models) > 1 and (self.servers or self.path is not None):
            raise RacError(
                f"{len(models)} models are named, and --server and --answers are for one; evaluate each alone, the dense one "
                "with --json FILE, the others with --baseline FILE"
            )
        if self.samples > 1 and not temperature:
            raise RacError(
                f"--samples {self.samples} at temperature 0 are the same answer; give --temperature 0.6"
            )
        if self.servers:
            from rac_modifier.settings.check import check_settings
            from rac_modifier.settings.sampling import EngineSettings

            check_settings(
                EngineSettings, {"base_urls": self.servers, "model": self.served_as}, "--server"
            )
        if self.serve:
            from rac_modifier.sampling.vllm_command import VllmCommand

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
        """Evaluate one model.

        Args:
            name: as the user wrote it.
            problems: to be answered.
            source: fields of `ProblemSource` that say where the problems come from.
            limits: cap, temperature, top-p, batch size and seed.
            prompt: for all models.
            precision: of a model in this process.
            verifiers: by task name, what replaces the mathematical comparison of answers.
        """
        from rac_modifier.evaluation.accuracy import evaluate_into_file
        from rac_modifier.settings.problems import ProblemSource
        from rac_modifier.settings.sampling import SamplingSettings

        model, tokenizer = subject_of(name) if self.served else load_on_accelerator(name, precision)
        sampling = SamplingSettings(
            top_k=0, samples_per_problem=self.samples, **limits, **prompt.model_dump()
        )
        interrupted = resumable("the answers so far are kept; run the same command again to go on")
        with interrupted, self._engine(name, precision, sampling.max_new_tokens) as engine:
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
    def _engine(self, name: str, precision: Dtype, cap: int) -> Iterator[EngineSettings | None]:
        """The servers that are asked inside the context; None: the model in this process."""
        from rac_modifier.settings.sampling import EngineSettings

        how: dict[str, Any] = {"concurrency": self.concurrency, "timeout": timeout_of(cap)}
        if self.serve:
            from rac_modifier.sampling.own_server import vllm_server
            from rac_modifier.sampling.vllm_command import VllmCommand

            with vllm_server(VllmCommand.from_environment(), resolve(name), precision.value) as url:
                yield EngineSettings(base_urls=(url,), **how)
        else:
            yield (
                EngineSettings(base_urls=self.servers, model=self.served_as, **how)
                if self.servers
                else None
            )
