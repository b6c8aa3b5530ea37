"""The part of `rac eval` that keeps answers in a file: servers, several answers per problem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
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
    from rac_modifier.settings.sampling import EngineSettings, PromptSettings, SamplingSettings

_GO_ON = "the answers so far are kept; run the same command again to go on"
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
    """What the options of `rac eval` say of servers and of the file of answers.

    `samples` are answers per problem; `serve` starts a server; `served_as` is the servers' name of
    the model. Without a model folder, each server has a model and a name, the dense one first.
    """

    servers: tuple[str, ...]
    concurrency: int
    samples: int
    path: Path | None
    serve: bool = False
    served_as: tuple[str, ...] = ()

    @property
    def served(self) -> bool:
        """Return whether a server answers, and not the model in this process."""
        return self.serve or bool(self.servers)

    @property
    def keeps_answers(self) -> bool:
        """Return whether answers go through a file."""
        return self.served or self.path is not None or self.samples > 1

    def check(
        self,
        models: Sequence[str],
        *,
        divergence: bool,
        temperature: float | None,
        written: Set[str] = frozenset(),
    ) -> None:
        """Refuse what has no effect or cannot be, before anything is loaded (RacError).

        `written`: the names of the options that the user wrote.
        """
        one_model = bool(self.servers) or self.path is not None
        needless = written & {"card", "template"} if not models else ()
        for holds, message in (
            (
                not models and not self.servers,
                'no model is named; give a model folder, a Hugging Face id or "reasoner", or '
                "--server URL",
            ),
            (
                len(self.served_as) > 1 and bool(models),
                f"--served-as {' and '.join(self.served_as)} name one model; give one of them",
            ),
            (
                bool(needless),
                f"--{min(needless, default='')} needs a model folder, and servers alone are named; "
                "leave it out",
            ),
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
                bool(self.served_as) and not self.servers,
                f"--served-as {' '.join(self.served_as)} is for --server; leave it out",
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
        if models and self.servers:
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

        model, tokenizer = subject_of(name) if self.served else load_on_accelerator(name, precision)
        sampling = self._sampling(limits, prompt)
        with resumable(_GO_ON), self.engine(name, precision, sampling.max_new_tokens) as engine:
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

    def run_by_name(
        self,
        problems: Sequence[Problem],
        source: Mapping[str, Any],
        limits: Mapping[str, Any],
        prompt: PromptSettings,
        verifiers: Mapping[str, Verifier],
    ) -> list[EvalResult]:
        """Evaluate the servers by address and name alone, in their order."""
        from rac_modifier.evaluation.chat import evaluate_chat
        from rac_modifier.settings.problems import ProblemSource

        sampling, results, subjects = self._sampling(limits, prompt), [], self._subjects()
        with resumable(_GO_ON):
            for url, name in subjects:
                result = evaluate_chat(
                    problems,
                    engine=engine_of((url,), self.concurrency, sampling.max_new_tokens, name),
                    source=ProblemSource(**source),
                    sampling=sampling,
                    path=self.path,
                    verifiers=verifiers,
                )
                results.append(result)
        if len({result.label for result in results}) < len(results):  # one name on two servers
            labels = [f"{r.label} at {url}" for r, (url, _) in zip(results, subjects, strict=True)]
            return [replace(r, label=name) for r, name in zip(results, labels, strict=True)]
        return results

    def _subjects(self) -> list[tuple[str, str | None]]:
        """Return address and name of each model without a folder (RacError: they do not match)."""
        names = self.served_as or (None,) * len(self.servers)
        urls = self.servers * len(names) if len(self.servers) == 1 else self.servers
        if len(urls) != len(names):
            raise RacError(
                f"--server names {len(urls)} servers and --served-as {len(names)} models; give one "
                "name per server, in the order of the servers"
            )
        pairs = list(zip(urls, names, strict=True))
        engines = [engine_of((url,), self.concurrency, 1, name) for url, name in pairs]
        if any(engine in engines[:i] for i, engine in enumerate(engines)):
            raise RacError(
                f"--server {urls[-1]} names a model twice; tell two models of a server apart with "
                "--served-as, once for each"
            )
        return pairs

    def _sampling(self, limits: Mapping[str, Any], prompt: PromptSettings) -> SamplingSettings:
        from rac_modifier.settings.sampling import SamplingSettings

        return SamplingSettings(
            top_k=0, samples_per_problem=self.samples, **limits, **prompt.model_dump()
        )

    @contextmanager
    def engine(self, name: str, precision: Dtype, cap: int) -> Iterator[EngineSettings | None]:
        """Yield the servers that are asked; None: the model in this process."""
        if self.serve:
            with own_server(name, precision, self.concurrency, cap) as engine:
                yield engine
        elif self.servers:
            yield engine_of(self.servers, self.concurrency, cap, *self.served_as)
        else:
            yield None
