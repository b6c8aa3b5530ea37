"""What `rac eval` asks: its options, else `--preset`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.evaluation.presets import Preset
    from rac_modifier.problems.answers import Verifier
    from rac_modifier.problems.source import Problem
    from rac_modifier.settings.problems import ProblemSource
    from rac_modifier.settings.sampling import PromptSettings, SamplingSettings


@dataclass(frozen=True)
class Protocol:
    """Problems and sampling of an evaluation."""

    source: str
    column: str | None
    answer_column: str | None
    problems: int | None  # None: all that the source has
    samples: int  # answers per problem
    cap: int  # most new tokens
    temperature: float | None  # None: greedy, or with --divergence the model's own
    top_p: float | None  # None: 0.95, or with --divergence the model's own
    seed: int
    preset: Preset | None = None  # has the values that no option sets
    changed: Mapping[str, Any] = field(default_factory=dict)  # by option set, the preset's value

    def with_preset(self, name: str | None, options: Collection[str]) -> Protocol:
        """Fill from a preset what is not among the user's `options` (RacError: a generator)."""
        if name is None:
            return self
        from rac_modifier.evaluation.presets import PRESETS
        from rac_modifier.settings.problems import ProblemSource

        preset = PRESETS[name]
        published: dict[str, Any] = {
            "source": preset.source,
            "column": preset.layout.column,
            "answer_column": preset.layout.answer_column,
            "samples": preset.samples,
            "cap": preset.cap,
            "temperature": preset.temperature,
            "top_p": preset.top_p,
            "problems": preset.problems,
        }
        values = {option: value for option, value in published.items() if option not in options}
        changed = {
            option: value
            for option, value in published.items()
            if option in options and getattr(self, option) != value
        }
        if "problems" in values:
            values["problems"] = None
        protocol = replace(self, **values, preset=preset, changed=changed)
        if ProblemSource(source=protocol.source).is_generator:
            raise RacError(
                f"--preset {name} cannot ask --source {self.source}, which generates problems of "
                "its own; leave one of them out, or name a file or a dataset"
            )
        return protocol

    @property
    def problem_source(self) -> ProblemSource:
        """Return where the problems come from."""
        from rac_modifier.settings.problems import ProblemSource

        fields: dict[str, Any] = {"column": self.column, "answer_column": self.answer_column}
        if self.preset is not None and not ProblemSource(source=self.source).is_file:
            fields["split"] = self.preset.split
            if self.source == self.preset.source:  # a mirror has no configurations
                fields["config"] = self.preset.config
        return ProblemSource(source=self.source, **fields)

    def load(self) -> list[Problem]:
        """Return the problems, in an order that the seed decides.

        Raises:
            RacError: what cannot be loaded, with the next step; fewer problems than asked for.
        """
        from rac_modifier.problems.held_out import benchmark_problems, held_out_problems

        if (preset := self.preset) is None:
            assert self.problems is not None
            columns = {"column": self.column, "answer_column": self.answer_column}
            return held_out_problems(self.source, self.problems, self.seed, **columns)
        try:
            return benchmark_problems(self.problem_source, preset.layout, self.seed, self.problems)
        except RacError as error:
            asks = preset.access and "source" not in self.changed
            access = f" ({preset.access})" if asks else ""
            raise RacError(
                f"--preset {preset.layout.task}: {error}. Its problems are those of {preset.source}"
                f"{access}; a copy with the same columns is read with --source FILE"
            ) from error

    def sampling(
        self, prompt: PromptSettings, batch_size: int, *, divergence: bool = False
    ) -> SamplingSettings:
        """Return the settings of sampling (RacError: out of range)."""
        from rac_modifier.evaluation.accuracy import TOP_P
        from rac_modifier.settings.check import check_settings
        from rac_modifier.settings.sampling import SamplingSettings

        values: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        if not divergence:
            top_p = TOP_P if self.top_p is None else self.top_p
            values = {"temperature": self.temperature or 0.0, "top_p": top_p, "top_k": 0}
        if self.samples > 1 and values["temperature"] == 0:
            raise RacError(
                f"--samples {self.samples} at temperature 0 are the same answer; give "
                "--temperature 0.6"
            )
        values |= {"max_new_tokens": self.cap, "samples_per_problem": self.samples}
        values |= {"seed": self.seed, "batch_size": batch_size, **prompt.model_dump()}
        return check_settings(SamplingSettings, values, "rac eval")

    def verifiers(self) -> dict[str, Verifier]:
        """Return, by task, what replaces the mathematical comparison of answers."""
        from rac_modifier.problems.held_out import verifiers_of

        return {} if self.preset is None else verifiers_of(self.preset.layout)

    def describe(self, count: int) -> list[str]:
        """Return a line on the preset and what differs from it, for `count` problems; or none."""
        if self.preset is None:
            return []
        text = (
            f"Preset {self.preset.layout.task}: {count} problems, {self.samples} "
            f"answer{'s' if self.samples > 1 else ''} each, temperature {self.temperature or 0:g}, "
            f"top-p {self.top_p:g}, at most {self.cap:,} new tokens."
        )
        changed = dict(self.changed)
        if count != self.preset.problems:
            changed["problems"] = self.preset.problems
        different = [f"{name.replace('_', '-')} is {value!r}" for name, value in changed.items()]
        return [f"{text} Not as published ({', '.join(different)} there)." if different else text]

    def record(self, count: int, sampling: SamplingSettings) -> dict[str, Any]:
        """Return plain values for JSON: what was asked, how, and what the preset has instead."""
        columns = {"source", "column", "answer_column", "split", "config"}
        values = {
            **self.problem_source.model_dump(include=columns),
            "problems": count,
            "samples": self.samples,
            **sampling.model_dump(include={"max_new_tokens", "temperature", "top_p"}),
        }
        if (preset := self.preset) is not None:
            published = {"problems": preset.problems, **self.changed}
            values |= {"preset": preset.layout.task, "published": published}
        return values
