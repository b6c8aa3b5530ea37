"""The options of `rac eval`: what is asked, of whom, and what is written; a preset fills in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer
from pydantic import model_validator

from rac_modifier.cli import options
from rac_modifier.cli.models import engine_of
from rac_modifier.errors import RacError
from rac_modifier.settings.check import Settings, check_settings
from rac_modifier.settings.problems import FILE_SUFFIXES, ProblemSource
from rac_modifier.settings.sampling import PromptSettings, SamplingSettings

if TYPE_CHECKING:
    from rac_modifier.problems.answers import Verifier
    from rac_modifier.problems.held_out import Preset
    from rac_modifier.problems.source import Problem


class EvalOptions(Settings):
    """What a user can give to `rac eval`; `model_fields_set` are those given, or of the preset."""

    models: Annotated[
        list[str],
        typer.Argument(
            help='folders, Hugging Face ids or "reasoner"; the dense one first; none: --server'
        ),
    ] = []
    problems: Annotated[int, typer.Option(min=1, help="number of problems")] = 300
    source: options.Source = "arithmetic"
    preset: Annotated[
        Literal["aime24", "aime25", "gpqa-diamond", "gsm8k", "math-500"] | None,
        typer.Option(metavar="NAME", help="aime24, aime25, gpqa-diamond, gsm8k or math-500"),
    ] = None
    column: options.Column = None
    answer_column: Annotated[
        str | None, typer.Option(help="column of the answer (file or dataset)")
    ] = None
    cap: Annotated[int, typer.Option(min=1, help="most new tokens per answer")] = 512
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0: greedy, the default; with --divergence the model's own"),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(help="of sampled answers; default 0.95, with --divergence the model's own"),
    ] = None
    batch_size: Annotated[
        int, typer.Option(min=1, help="answers generated together in this process")
    ] = 128
    seed: Annotated[int, typer.Option(help="seed of problems and sampling")] = 0
    system_prompt: Annotated[
        str | None, typer.Option(help='for all models, "" for none; default: as in calibration')
    ] = None
    template: Annotated[
        Literal["chat", "none"] | None,
        typer.Option(help="chat, or none for the bare question; default: as in calibration"),
    ] = None
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="enable_thinking of the chat template; default: as in calibration",
        ),
    ] = None
    samples: Annotated[int, typer.Option(min=1, help="answers per problem, for pass@k")] = 1
    server: Annotated[
        list[str],
        typer.Option(metavar="URL", help="OpenAI-compatible server; without models: one each"),
    ] = []
    served_as: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="with --server: its name of the model; one for each"),
    ] = []
    serve: Annotated[
        bool,
        typer.Option("--serve", help="start vllm serve for each model, and stop it at the end"),
    ] = False
    concurrency: Annotated[
        int, typer.Option(min=1, max=4096, help="answers of a server in progress")
    ] = 64
    answers: Annotated[
        Path | None, typer.Option(help="file of the answers; default: in rac_answers/")
    ] = None
    baseline: Annotated[
        Path | None, typer.Option(help="the dense model's --json FILE, to pair accuracies with")
    ] = None
    precision: options.Precision = "auto"
    divergence: Annotated[
        bool,
        typer.Option("--divergence", help="instead: KL and top-1 agreement with the dense model"),
    ] = False
    stopping: Annotated[
        bool,
        typer.Option("--stopping", help="instead: how answers end and their lengths, not graded"),
    ] = False
    card: Annotated[
        bool, typer.Option("--card", help="write the figures into README.md of the models")
    ] = False
    json_out: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="write the results to this file too; - prints only JSON"
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, given: dict[str, Any]) -> dict[str, Any]:
        if (name := given.get("preset")) is None:
            return given
        from rac_modifier.problems.held_out import PRESETS

        return {**PRESETS[name].published, **given}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        served, count = bool(self.server), len(self.served_as)
        on_servers = zip(self.server, self.served_as or self.server, strict=False)
        named: list[Any] = self.models or list(on_servers)
        contradictions = {
            "no model is named; give a model folder, a Hugging Face id, or --server URL": (
                not self.models and not served
            ),
            "--served-as names the model of a server; add --server URL, or leave it out": (
                count > 0 and not served
            ),
            "--served-as names several models; give the one of the model folder": (
                bool(self.models) and count > 1
            ),
            f"--served-as names {count} models for {len(self.server)} servers; give one each": (
                not self.models and count not in (0, len(self.server))
            ),
            "--card and --template need a model folder; leave them out": (
                not self.models and (self.card or self.template is not None)
            ),
            "a model is named twice and would be compared with itself; leave it out, or name "
            "another (of one server: --served-as)": len(set(named)) < len(named),
            "--precision is for a model that is loaded here; leave it out with --server": (
                served and "precision" in self.model_fields_set
            ),
            "--divergence asks the model in this process; leave --server and --serve out": (
                self.divergence and (self.serve or served)
            ),
            "--divergence compares with the first model named; leave --baseline out": (
                self.divergence and self.baseline is not None
            ),
            "--divergence compares models with the first one; name at least two": (
                self.divergence and len(self.models) < 2
            ),
            "--stopping prints its own tables; leave --divergence and --card out": (
                self.stopping and (self.divergence or self.card)
            ),
            "--serve starts a server, and --server names one; leave one of them out": (
                self.serve and served
            ),
            "--server and --answers are for one model; evaluate each alone, the dense one with "
            "--json FILE, the others with --baseline FILE": (
                len(self.models) > 1 and (served or self.answers is not None)
            ),
        }
        if message := next((text for text, holds in contradictions.items() if holds), None):
            raise RacError(message)
        if served:
            engine_of(self.server, self.concurrency, 1)
        return self

    @property
    def benchmark(self) -> Preset | None:
        """Return the preset that is named."""
        if self.preset is None:
            return None
        from rac_modifier.problems.held_out import PRESETS

        return PRESETS[self.preset]

    @property
    def changed(self) -> dict[str, Any]:
        """Return the preset's value of each option that differs from it."""
        published = {} if self.benchmark is None else self.benchmark.published
        return {name: value for name, value in published.items() if getattr(self, name) != value}

    @property
    def problem_source(self) -> ProblemSource:
        """Return where the problems are read (RacError: not from there)."""
        columns = {"column": self.column, "answer_column": self.answer_column}
        fields: dict[str, Any] = {"source": self.source, **columns}
        if (preset := self.benchmark) and not self.source.endswith(FILE_SUFFIXES):
            fields["split"] = preset.split
            if self.source == preset.source:  # a mirror has no configurations
                fields["config"] = preset.config
        return check_settings(ProblemSource, fields, "--source")

    def load_problems(self) -> list[Problem]:
        """Return the problems in the seed's order (RacError: too few, or they cannot be loaded)."""
        from rac_modifier.problems.held_out import benchmark_problems, held_out_problems

        if (preset := self.benchmark) is None:
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

    def sampling(self, prompt: PromptSettings) -> SamplingSettings:
        """Return the settings of sampling (RacError: out of range)."""
        from rac_modifier.evaluation.accuracy import TOP_P

        values: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        if not self.divergence:
            top_p = TOP_P if self.top_p is None else self.top_p
            values = {"temperature": self.temperature or 0.0, "top_p": top_p, "top_k": 0}
        values |= {"max_new_tokens": self.cap, "samples_per_problem": self.samples}
        values |= {"seed": self.seed, "batch_size": self.batch_size, **prompt.model_dump()}
        return check_settings(SamplingSettings, values, "rac eval")

    @property
    def verifier(self) -> Verifier | None:
        """Return what replaces the mathematical comparison of answers."""
        from rac_modifier.problems.held_out import same_letter

        lettered = self.benchmark is not None and self.benchmark.answers == "choices"
        return same_letter if lettered else None

    def describe_preset(self) -> list[str]:
        """Return a line on the preset and what differs from it, or none."""
        if self.preset is None:
            return []
        text = (
            f"Preset {self.preset}: {self.problems} problems, {self.samples} "
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
            values |= {"preset": self.preset, "published": self.changed}
        return values
