"""What `rac eval` asks: its options, else `--preset`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.problems.answers import Verifier
    from rac_modifier.problems.held_out import Preset
    from rac_modifier.problems.source import Problem
    from rac_modifier.settings.problems import ProblemSource
    from rac_modifier.settings.sampling import PromptSettings, SamplingSettings


@dataclass(frozen=True)
class Protocol:
    """Problems and sampling of an evaluation."""

    source: str
    column: str | None
    answer_column: str | None
    problems: int
    samples: int  # answers per problem
    cap: int  # most new tokens
    temperature: float | None  # None: greedy, or with --divergence the model's own
    top_p: float | None  # None: 0.95, or with --divergence the model's own
    seed: int
    preset: Preset | None = None  # has the values that no option sets

    def with_preset(self, name: str | None, options: Collection[str]) -> Protocol:
        """Fill from a preset what is not among the user's `options`."""
        if name is None:
            return self
        from rac_modifier.problems.held_out import PRESETS

        preset = PRESETS[name]
        values = {key: value for key, value in preset.published.items() if key not in options}
        return replace(self, **values, preset=preset)

    @property
    def changed(self) -> dict[str, Any]:
        """Return the preset's value of each option that differs from it."""
        published = {} if self.preset is None else self.preset.published
        return {name: value for name, value in published.items() if getattr(self, name) != value}

    @property
    def problem_source(self) -> ProblemSource:
        """Return where the problems come from (RacError: the source has no columns)."""
        from rac_modifier.settings.check import check_settings
        from rac_modifier.settings.problems import FILE_SUFFIXES, ProblemSource

        columns = {"column": self.column, "answer_column": self.answer_column}
        fields: dict[str, Any] = {"source": self.source, **columns}
        if self.preset is not None and not self.source.endswith(FILE_SUFFIXES):
            fields["split"] = self.preset.split
            if self.source == self.preset.source:  # a mirror has no configurations
                fields["config"] = self.preset.config
        return check_settings(ProblemSource, fields, "--source")

    def load(self) -> list[Problem]:
        """Return the problems in the seed's order (RacError: too few, or they cannot be loaded)."""
        from rac_modifier.problems.held_out import benchmark_problems, held_out_problems

        if (preset := self.preset) is None:
            columns = {"column": self.column, "answer_column": self.answer_column}
            return held_out_problems(self.source, self.problems, self.seed, **columns)
        try:
            return benchmark_problems(self.problem_source, preset, self.seed, self.problems)
        except RacError as error:
            asks = preset.access and "source" not in self.changed
            access = f" ({preset.access})" if asks else ""
            raise RacError(
                f"--preset {preset.name}: {error}. Its problems are those of {preset.source}"
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
        values |= {"max_new_tokens": self.cap, "samples_per_problem": self.samples}
        values |= {"seed": self.seed, "batch_size": batch_size, **prompt.model_dump()}
        return check_settings(SamplingSettings, values, "rac eval")

    @property
    def verifier(self) -> Verifier | None:
        """Return what replaces the mathematical comparison of answers."""
        from rac_modifier.problems.held_out import same_letter

        lettered = self.preset is not None and self.preset.answers == "choices"
        return same_letter if lettered else None

    def describe(self) -> list[str]:
        """Return a line on the preset and what differs from it, or none."""
        if self.preset is None:
            return []
        text = (
            f"Preset {self.preset.name}: {self.problems} problems, {self.samples} "
            f"answer{'s' if self.samples > 1 else ''} each, temperature {self.temperature or 0:g}, "
            f"top-p {self.top_p:g}, at most {self.cap:,} new tokens."
        )
        differ = [f"{name.replace('_', '-')} is {value!r}" for name, value in self.changed.items()]
        return [f"{text} Not as published ({', '.join(differ)} there)." if differ else text]

    def record(self, sampling: SamplingSettings) -> dict[str, Any]:
        """Return plain values for JSON: what was asked, how, and what the preset has instead."""
        columns = {"source", "column", "answer_column", "split", "config"}
        values = {
            **self.problem_source.model_dump(include=columns),
            "problems": self.problems,
            "samples": self.samples,
            **sampling.model_dump(include={"max_new_tokens", "temperature", "top_p"}),
        }
        if self.preset is not None:
            values |= {"preset": self.preset.name, "published": self.changed}
        return values
