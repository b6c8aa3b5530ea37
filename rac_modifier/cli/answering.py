"""Who answers the problems of `rac eval`: servers, a server that is started, or this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rac_modifier.cli.models import load_on_accelerator, resolve, subject_of
from rac_modifier.cli.options import Dtype, resumable
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.evaluation.results import EvalResult
    from rac_modifier.problems.answers import Verifier
    from rac_modifier.problems.source import Problem
    from rac_modifier.settings.problems import ProblemSource
    from rac_modifier.settings.sampling import EngineSettings, SamplingSettings

_TIMEOUT = 600.0  # seconds per answer, at least
_SECONDS_PER_TOKEN = 0.25  # of one answer among many, on a slow server


@contextmanager
def own_server(
    model: str, precision: Dtype, concurrency: int, cap: int
) -> Iterator[EngineSettings]:
    """Run `vllm serve` with the model in the context; an answer has at most `cap` tokens."""
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
    """The options of `rac eval` about servers and the file of answers."""

    servers: tuple[str, ...]  # of one model; without a folder, each has one, the dense one first
    served_as: tuple[str, ...]  # the servers' names of the model or models
    serve: bool  # start a server for each model
    concurrency: int  # answers of a server in progress
    path: Path | None  # of the file of answers; None: in rac_answers/
    precision: Dtype  # of a model that is loaded or served here

    def check(self, models: Sequence[str], written: Set[str], *, divergence: bool) -> None:
        """Refuse contradictions, also among the options `written` by the user (RacError)."""
        needless = () if models else written & {"card", "template"}
        for holds, message in (
            (
                not models and not self.servers,
                "no model is named; give a model folder, a Hugging Face id, or --server URL",
            ),
            (
                len(self.served_as) > 1 and bool(models),
                f"--served-as {' and '.join(self.served_as)} name one model; give one of them",
            ),
            (
                bool(needless),
                f"--{min(needless, default='')} needs a model folder; leave it out",
            ),
            (
                "precision" in written and bool(self.servers),
                "--precision is for a model that is loaded here; leave it out with --server",
            ),
            (
                divergence and (self.serve or bool(self.servers)),
                "--divergence asks the model in this process; leave --server and --serve out",
            ),
            (
                self.serve and bool(self.servers),
                f"--serve and --server {', '.join(self.servers)}: leave one of them out",
            ),
            (
                len(models) > 1 and (bool(self.servers) or self.path is not None),
                f"{len(models)} models are named, and --server and --answers are for one; evaluate "
                "each alone, the dense one with --json FILE, the others with --baseline FILE",
            ),
        ):
            if holds:
                raise RacError(message)
        if self.servers:
            engine_of(self.servers, self.concurrency, 1)
        if not models and len(self._subjects()) > 1 and self.path is not None:
            raise RacError(
                f"--answers {self.path} is for one server, and several are named; leave it out"
            )
        if self.serve:
            from rac_modifier.sampling.own_server import VllmCommand

            VllmCommand.from_environment()

    def run(
        self,
        models: Sequence[str],
        problems: Sequence[Problem],
        source: ProblemSource,
        sampling: SamplingSettings,
        verifiers: Mapping[str, Verifier],
    ) -> list[EvalResult]:
        """Evaluate the models, or without models the servers, in their order."""
        how: dict[str, Any] = {
            "source": source,
            "sampling": sampling,
            "path": self.path,
            "verifiers": verifiers,
        }
        with resumable("the answers so far are kept; run the same command again to go on"):
            if not models:
                return self._ask_servers(problems, how)
            return [self._ask_model(name, problems, how) for name in models]

    def _ask_model(
        self, name: str, problems: Sequence[Problem], how: Mapping[str, Any]
    ) -> EvalResult:
        from rac_modifier.evaluation.accuracy import evaluate

        cap = how["sampling"].max_new_tokens
        engine: AbstractContextManager[EngineSettings | None] = nullcontext()
        if self.serve:
            engine = own_server(name, self.precision, self.concurrency, cap)
        elif self.servers:
            engine = nullcontext(engine_of(self.servers, self.concurrency, cap, *self.served_as))
        served = self.serve or self.servers
        model = subject_of(name) if served else load_on_accelerator(name, self.precision)
        with engine as settings:
            return evaluate(*model, problems, label=name, engine=settings, **how)

    def _ask_servers(self, problems: Sequence[Problem], how: Mapping[str, Any]) -> list[EvalResult]:
        from rac_modifier.evaluation.chat import evaluate_chat

        results, subjects = [], self._subjects()
        for url, name in subjects:
            engine = engine_of((url,), self.concurrency, how["sampling"].max_new_tokens, name)
            results.append(evaluate_chat(problems, engine=engine, **how))
        if len({result.label for result in results}) == len(results):
            return results
        urls = (url for url, _ in subjects)
        return [
            replace(r, label=f"{r.label} at {url}") for r, url in zip(results, urls, strict=True)
        ]

    def _subjects(self) -> list[tuple[str, str | None]]:
        """Return address and name of each model without a folder (RacError: they do not match)."""
        names = self.served_as or (None,) * len(self.servers)
        urls = self.servers * len(names) if len(self.servers) == 1 else self.servers
        if len(urls) != len(names):
            raise RacError(
                f"--server names {len(urls)} servers and --served-as {len(names)} models; give one "
                "name per server, in the order of the servers"
            )
        return list(zip(urls, names, strict=True))
