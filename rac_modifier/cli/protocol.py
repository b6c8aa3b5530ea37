"""What `rac eval` asks, and how: its options, and where they say nothing, those of `--preset`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import typer

from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.evaluation.presets import Preset
    from rac_modifier.problems.answers import Verifier
    from rac_modifier.problems.source import Problem

# Options whose value is the preset's where the user does not write them.
_SET_BY_PRESET = ("source", "column", "answer_column", "samples", "cap", "temperature", "top_p")


def written_options(context: typer.Context) -> set[str]:
    """The parameters of a command that the user wrote, by name."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {
        name for name, source in sources.items() if source is not None and source.name != "DEFAULT"
    }


@dataclass(frozen=True)
class Protocol:
    """Problems and sampling of an evaluation.

    Attributes:
        source, column, answer_column: where the problems come from.
        problems: how many; None: all that the source has.
        samples: answers per problem.
        cap: most new tokens.
        temperature: None: greedy, or with --divergence the model's own.
        top_p: None: 0.95, or with --divergence the model's own.
        preset: where the values come from that no option sets.
        changed: by option that the user set, the preset's value.
    """

    source: str
    column: str | None
    answer_column: str | None
    problems: int | None
    samples: int
    cap: int
    temperature: float | None
    top_p: float | None
    preset: Preset | None = None
    changed: Mapping[str, Any] = field(default_factory=dict)

    def with_preset(self, name: str | None, options: Collection[str]) -> Protocol:
        """These options; what is not among `options` (names of the options that the user wrote) is the preset's.

        Raises:
            RacError: no preset of that name.
        """
        if name is None:
            return self
        from rac_modifier.evaluation.presets import preset_of

        preset = preset_of(name)
        published = {
            "source": preset.source,
            "column": preset.layout.column,
            "answer_column": preset.layout.answer_column,
            **{name: getattr(preset, name) for name in ("samples", "cap", "temperature", "top_p")},
        }
        written = {option for option in _SET_BY_PRESET if option in options}
        values = {option: value for option, value in published.items() if option not in written}
        changed = {option: published[option] for option in _SET_BY_PRESET if option in written}
        changed = {
            option: value for option, value in changed.items() if getattr(self, option) != value
        }
        if "problems" not in options:
            values["problems"] = None
        elif self.problems != preset.problems:
            changed["problems"] = preset.problems
        return replace(self, **values, preset=preset, changed=changed)

    def check(self, *, divergence: bool) -> None:
        """Refuse what has no effect or cannot be, before anything is loaded (RacError)."""
        from rac_modifier.settings.problems import ProblemSource

        if self.preset is not None and divergence:
            raise RacError(
                f"--preset {self.preset.name} compares whole answers by accuracy; leave it or --divergence out "
                f"(--source {self.preset.source} names its problems)"
            )
        if self.preset is not None and ProblemSource(source=self.source).is_generator:
            raise RacError(
                f"--preset {self.preset.name} cannot ask --source {self.source}, which generates problems of its own; leave "
                "one of them out, or name a file or a dataset"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RacError(
                f"--top-p {self.top_p:g} is not a share of the probability; give 0.95, or 1 for no limit"
            )
        written = self.preset is None or "top_p" in self.changed
        if self.top_p is not None and written and not self.temperature and not divergence:
            raise RacError(
                f"--top-p {self.top_p:g} has no effect on greedy answers; give --temperature 0.6 with it"
            )
        if self.preset is not None and self.preset.layout.answers != "choices":
            from rac_modifier.problems.answer_checker import check_installed

            check_installed("mathematics")

    def where(self) -> dict[str, Any]:
        """The fields of `ProblemSource` that say where the problems come from."""
        from rac_modifier.settings.problems import ProblemSource

        fields = {"source": self.source, "column": self.column, "answer_column": self.answer_column}
        if self.preset is not None and not ProblemSource(source=self.source).is_file:
            fields["split"] = (
                self.preset.split
            )  # a mirror of the dataset has it too, but not its configurations
            fields["config"] = self.preset.config if self.source == self.preset.source else None
        return fields

    def load(self, seed: int) -> list[Problem]:
        """The problems, in an order that the seed decides.

        Raises:
            RacError: what cannot be loaded, with what to do about it; fewer problems than asked for.
        """
        if self.preset is None:
            from rac_modifier.problems.held_out import held_out_problems

            assert self.problems is not None
            return held_out_problems(
                self.source, self.problems, seed, self.column, self.answer_column
            )
        from rac_modifier.problems.benchmarks import benchmark_problems
        from rac_modifier.settings.problems import ProblemSource

        try:
            return benchmark_problems(
                ProblemSource(**self.where()), self.preset.layout, seed, self.problems
            )
        except RacError as error:
            access = (
                f" ({self.preset.access})"
                if self.preset.access and "source" not in self.changed
                else ""
            )
            raise RacError(
                f"--preset {self.preset.name}: {error}. Its problems are those of {self.preset.source}{access}; a copy with "
                "the same columns is read with --source FILE"
            ) from error

    def limits(self) -> dict[str, Any]:
        """Sampling where answers are checked: cap, temperature and top-p."""
        from rac_modifier.evaluation.accuracy import TOP_P

        top_p = TOP_P if self.top_p is None else self.top_p
        return {"max_new_tokens": self.cap, "temperature": self.temperature or 0.0, "top_p": top_p}

    def verifiers(self) -> dict[str, Verifier]:
        """By task, what replaces the mathematical comparison of answers to these problems."""
        if self.preset is None:
            return {}
        from rac_modifier.problems.benchmarks import verifiers_of

        return verifiers_of(self.preset.layout)

    def describe(self, asked: int) -> list[str]:
        """A line that says what was asked by the preset, and what differs from it; none without a preset.

        Args:
            asked: how many problems.
        """
        if self.preset is None:
            return []
        text = (
            f"Preset {self.preset.name}: {asked} problems, {self.samples} answer{'s' if self.samples > 1 else ''} each, "
            f"temperature {self.temperature or 0:g}, top-p {self.top_p:g}, at most {self.cap:,} new tokens."
        )
        differences = [
            f"{option.replace('_', '-')} is {value!r}" for option, value in self.changed.items()
        ]
        if asked != self.preset.problems and "problems" not in self.changed:
            differences.append(f"problems is {self.preset.problems}")
        return [
            f"{text} Not as published ({', '.join(differences)} there)." if differences else text
        ]

    def record(self, asked: int) -> dict[str, Any]:
        """Plain values for JSON: what was asked, how, and what the preset has where that differs.

        Args:
            asked: how many problems.
        """
        values: dict[str, Any] = {
            **self.where(),
            "problems": asked,
            "samples": self.samples,
            **self.limits(),
        }
        if self.preset is not None:
            values |= {
                "preset": self.preset.name,
                "published": {"problems": self.preset.problems, **self.changed},
            }
        return values
