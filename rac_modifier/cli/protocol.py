"""What `rac eval` asks: its options, else `--preset`."""

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
    from rac_modifier.settings.problems import ProblemSource


def written_options(context: typer.Context) -> set[str]:
    """Return the parameters of a command that the user wrote, by name."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name != "DEFAULT"}


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
        """Fill from a preset what is not among the user's `options` (RacError: no preset)."""
        if name is None:
            return self
        from rac_modifier.evaluation.presets import preset_of

        preset = preset_of(name)
        published: dict[str, Any] = {
            "source": preset.source,
            "column": preset.layout.column,
            "answer_column": preset.layout.answer_column,
            **{name: getattr(preset, name) for name in ("samples", "cap", "temperature", "top_p")},
        }
        changed = {
            option: value
            for option, value in published.items()
            if option in options and getattr(self, option) != value
        }
        values = {option: value for option, value in published.items() if option not in options}
        if "problems" not in options:
            values["problems"] = None
        elif self.problems != preset.problems:
            changed["problems"] = preset.problems
        return replace(self, **values, preset=preset, changed=changed)

    @property
    def _source(self) -> ProblemSource:
        from rac_modifier.settings.problems import ProblemSource

        return ProblemSource(source=self.source)

    def check(self, *, divergence: bool) -> None:
        """Refuse what has no effect or cannot be, before anything is loaded (RacError)."""
        preset, top_p = self.preset, self.top_p
        if preset is not None and divergence:
            raise RacError(
                f"--preset {preset.name} compares whole answers by accuracy; leave it or "
                f"--divergence out (--source {preset.source} names its problems)"
            )
        if preset is not None and self._source.is_generator:
            raise RacError(
                f"--preset {preset.name} cannot ask --source {self.source}, which generates "
                "problems of its own; leave one of them out, or name a file or a dataset"
            )
        if top_p is not None and not 0 < top_p <= 1:
            raise RacError(
                f"--top-p {top_p:g} is not a share of the probability; give 0.95, or 1 for no limit"
            )
        written = preset is None or "top_p" in self.changed
        if top_p is not None and written and not self.temperature and not divergence:
            raise RacError(
                f"--top-p {top_p:g} has no effect on greedy answers; give --temperature 0.6 with it"
            )
        if preset is not None and preset.layout.answers != "choices":
            from rac_modifier.problems.answer_checker import check_installed

            check_installed("mathematics")

    def where(self) -> dict[str, Any]:
        """Return the fields of `ProblemSource` that say where the problems come from."""
        fields = {"source": self.source, "column": self.column, "answer_column": self.answer_column}
        if self.preset is None or self._source.is_file:
            return fields
        # a mirror of the dataset has its splits, but not its configurations
        config = self.preset.config if self.source == self.preset.source else None
        return {**fields, "split": self.preset.split, "config": config}

    def load(self, seed: int) -> list[Problem]:
        """Return the problems, in an order that the seed decides.

        Raises:
            RacError: what cannot be loaded, with the next step; fewer problems than asked for.
        """
        if (preset := self.preset) is None:
            from rac_modifier.problems.held_out import held_out_problems

            assert self.problems is not None
            return held_out_problems(
                self.source, self.problems, seed, self.column, self.answer_column
            )
        from rac_modifier.problems.held_out import benchmark_problems
        from rac_modifier.settings.problems import ProblemSource

        try:
            source = ProblemSource(**self.where())
            return benchmark_problems(source, preset.layout, seed, self.problems)
        except RacError as error:
            asks = preset.access and "source" not in self.changed
            access = f" ({preset.access})" if asks else ""
            raise RacError(
                f"--preset {preset.name}: {error}. Its problems are those of {preset.source}"
                f"{access}; a copy with the same columns is read with --source FILE"
            ) from error

    def limits(self) -> dict[str, Any]:
        """Return the sampling where answers are checked: cap, temperature and top-p."""
        from rac_modifier.evaluation.accuracy import TOP_P

        top_p = TOP_P if self.top_p is None else self.top_p
        return {"max_new_tokens": self.cap, "temperature": self.temperature or 0.0, "top_p": top_p}

    def verifiers(self) -> dict[str, Verifier]:
        """Return, by task, what replaces the mathematical comparison of answers."""
        if self.preset is None:
            return {}
        from rac_modifier.problems.held_out import verifiers_of

        return verifiers_of(self.preset.layout)

    def describe(self, count: int) -> list[str]:
        """Return a line on the preset and what differs from it, for `count` problems; or none."""
        if self.preset is None:
            return []
        text = (
            f"Preset {self.preset.name}: {count} problems, {self.samples} "
            f"answer{'s' if self.samples > 1 else ''} each, temperature {self.temperature or 0:g}, "
            f"top-p {self.top_p:g}, at most {self.cap:,} new tokens."
        )
        changed = dict(self.changed)
        if count != self.preset.problems:
            changed["problems"] = self.preset.problems
        different = [f"{name.replace('_', '-')} is {value!r}" for name, value in changed.items()]
        return [f"{text} Not as published ({', '.join(different)} there)." if different else text]

    def record(self, count: int) -> dict[str, Any]:
        """Return plain values for JSON: what was asked, how, and what the preset has instead."""
        values = {**self.where(), "problems": count, "samples": self.samples, **self.limits()}
        if (preset := self.preset) is not None:
            published = {"problems": preset.problems, **self.changed}
            values |= {"preset": preset.name, "published": published}
        return values
