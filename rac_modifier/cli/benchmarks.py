"""The benchmarks of a grid: what is asked, checked before anything runs, and who answers: this process, or `vllm serve`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rac_modifier.cli.answering import Answering
from rac_modifier.cli.options import Dtype
from rac_modifier.cli.protocol import Protocol

if TYPE_CHECKING:
    from rac_modifier.evaluation.results import EvalResult
    from rac_modifier.frontier.benchmarks import Benchmark, Servers
    from rac_modifier.problems.source import Problem
    from rac_modifier.settings.grid import GridBenchmark, GridEvaluation
    from rac_modifier.settings.sampling import PromptSettings


def protocol_of(benchmark: GridBenchmark) -> Protocol:
    """What is asked, as `rac eval --preset` would ask it.

    Raises:
        RacError: no preset of that name.
    """
    written = benchmark.model_dump(exclude={"preset"}, exclude_none=True)
    unset: dict[str, Any] = {
        "source": "",
        "column": None,
        "answer_column": None,
        "problems": 1,
        "samples": 1,
        "cap": 1,
    }
    options = {**unset, "temperature": None, "top_p": None, **written}
    return Protocol(**options).with_preset(benchmark.preset, written.keys())


def digest_of(problems: Sequence[Problem]) -> str:
    """Of questions and answers, so that a folder is not gone on with after a file of problems has changed."""
    asked = [[problem.id, problem.question, problem.answer] for problem in problems]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class AskedBenchmarks:
    """The benchmarks of a grid, their problems loaded when they are first needed.

    Attributes:
        evaluation: of the grid.
        prompt: of all models.
        precision: of models in this process.
        out: the folder of the frontier; the answers are kept in a folder of it.
    """

    evaluation: GridEvaluation
    prompt: PromptSettings
    precision: Dtype
    out: Path

    def check(self) -> None:
        """Refuse what cannot be asked, before problems are loaded and anything runs.

        Raises:
            RacError: a preset that does not exist.
        """
        for protocol in self._protocols.values():
            protocol.check(divergence=False)

    @cached_property
    def _protocols(self) -> dict[str, Protocol]:
        return {each.preset: protocol_of(each) for each in self.evaluation.benchmarks}

    @cached_property
    def _asked(self) -> dict[str, tuple[Protocol, list[Problem]]]:
        return {name: (protocol, protocol.load(0)) for name, protocol in self._protocols.items()}

    @cached_property
    def listed(self) -> list[Benchmark]:
        """What is asked, as plain values without paths.

        Raises:
            RacError: a preset that does not exist, or problems that cannot be loaded.
        """
        from rac_modifier.frontier.benchmarks import Benchmark
        from rac_modifier.machine_paths import without_paths

        def values(protocol: Protocol, problems: list[Problem]) -> dict[str, Any]:
            more = {"seed": 0, "questions": digest_of(problems)}
            return without_paths({**protocol.record(len(problems)), **more})

        return [Benchmark(name, values(*asked)) for name, asked in self._asked.items()]

    def ask(
        self, model: Path, label: str, benchmarks: Sequence[Benchmark], servers: Servers
    ) -> Iterator[tuple[Benchmark, EvalResult]]:
        """Each result as soon as it is there; answers are kept, so that a run that was killed goes on.

        Raises:
            RacError: a server that does not start or stops, or answers that are missing.
        """
        from rac_modifier.frontier.folder import slug

        with servers() as urls:
            for benchmark in benchmarks:
                protocol, problems = self._asked[benchmark.name]
                path = self.out / "benchmarks" / f"{slug(label)}-{benchmark.name}.jsonl"
                answering = Answering(urls, self.evaluation.in_progress, protocol.samples, path)
                limits = {
                    **protocol.limits(),
                    "batch_size": self.evaluation.batch_size,
                    "seed": 0,
                }
                where, verifiers = protocol.where(), protocol.verifiers()
                yield (
                    benchmark,
                    answering.run(
                        str(model), problems, where, limits, self.prompt, self.precision, verifiers
                    ),
                )
