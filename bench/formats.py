"""KL of formats on one model, along the dense model's answers to held-out prompts.

python -m bench formats
python -m bench formats --labels int4 "GPTQ int4"

Upstream's `oneshot` compresses each row of bench/formats.yaml in a process of its own, on the same
calibration tokens. The dense model answers each held-out prompt once at temperature 0.6 and once
greedily; both models then read these answers (teacher forcing). A finished row is not run again.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench.common import called_in_child, save
from bench.gguf_rows import GGUF, IMATRIX, quantized_by_llama_cpp
from bench.models import SUBJECTS, Subject, float32_copy
from rac_modifier import trace_dataset
from rac_modifier.checkpoint.card import RUN_RECORD_NAME
from rac_modifier.measure.divergence import DenseReference
from rac_modifier.measure.intervals import mean_over_tokens
from rac_modifier.measure.repeats import repeated_tail
from rac_modifier.measure.teacher_forcing import TokenSequence
from rac_modifier.problems.source import load_problems
from rac_modifier.sampling.generate import sample_sequences
from rac_modifier.settings.grid import Grid, plan_rows
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings

FORMATS = Path(__file__).with_name("formats.yaml")
ANSWERS = {"sampled": 0.6, "greedy": 0.0}  # temperatures
COLUMNS = {
    "format": "",
    "bits per weight": ".2f",
    "KL, sampled": ".4f",
    "KL, sampled, outside repetitions": ".4f",
    "KL, greedy": ".4f",
}
TINY = "--model reasoner --tokens 512 --answers 2 --cap 16 --labels int4"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--model", default="smollm2", choices=SUBJECTS)
    parser.add_argument("--labels", nargs="+", help="rows to run; default: all of formats.yaml")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration")
    parser.add_argument("--answers", type=int, default=64, help="held-out prompts")
    parser.add_argument("--cap", type=int, default=512, help="most tokens of an answer or trace")
    parser.add_argument("--kinds", nargs="+", choices=ANSWERS, default=list(ANSWERS))
    parser.add_argument("--seed", type=int, default=0, help="of the traces; else part of the label")


def run(options: argparse.Namespace) -> None:
    """Measure the rows that are missing, and write the table of all rows."""
    subject = float32_copy(options.model, options.work, options.cap)
    subject.shared["traces"]["sampling"]["seed"] = options.seed
    rows_of = yaml.safe_load(FORMATS.read_text())["rows"]
    draw = f", seed {options.seed}" if options.seed else ""
    recipes = {
        label + draw: recipe
        for label, recipe in recipes_of(subject, options.tokens, rows_of).items()
    }
    known = [*recipes, *(GGUF if not draw else ())]
    labels = [label + draw for label in options.labels] if options.labels else known
    if unknown := set(labels) - set(known):
        raise SystemExit(f"--labels: {sorted(unknown)} are no rows; there are {known}")
    path = options.work / f"formats-{options.model}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    finished = {row["label"]: row for row in map(json.loads, lines)}
    missing = [label for label in labels if label not in finished]
    answers: list[Answers] = []
    if missing:
        dense = load(Path(subject.model), Path(subject.model))
        tokenizer = AutoTokenizer.from_pretrained(subject.model)
        answers = [Answers(dense, tokenizer, subject, options, name) for name in options.kinds]
        del dense  # room for the compressed one
    for label in missing:
        folder = folder_of(options, label)
        if label in GGUF:
            texts = traces(subject) if IMATRIX in label else []
            pruned, bits = quantized_by_llama_cpp(label, Path(subject.model), folder, texts)
        else:
            compress(Path(subject.model), recipes[label], folder)
            pruned = load(folder, Path(subject.model))
            bits = bits_per_weight(folder, pruned)
        row = {"label": label, "bits": bits}
        for dense_answers in answers:
            row |= dense_answers.divergence(pruned)
        finished[label] = row
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    names = [n for n in ("sampled", "sampled outside", "greedy") if n.split()[0] in options.kinds]
    unit, factor = (", thousandths", 1000) if options.model == "reasoner" else ("", 1)
    shown = [name for name in COLUMNS if not name.startswith("KL")]
    shown += [name for name in COLUMNS if name.removeprefix("KL, ").split(",")[0] in options.kinds]
    columns = {name + unit * name.startswith("KL"): COLUMNS[name] for name in shown}
    rows = [
        [label, row["bits"], *([factor * n for n in row[name] if n is not None] for name in names)]
        for label, row in finished.items()
    ]
    save(options.out, f"formats_{options.model}", subject.name, columns, rows)
    records = {label: folder_of(options, label) / RUN_RECORD_NAME for label in labels}
    checks = [[label, *check] for label, record in records.items() for check in curve(record)]
    if checks:
        columns = {"format": "", "step": "", "held-out KL": ".3f"}
        save(options.out, f"curve_{options.model}", subject.name, columns, checks)


def curve(record: Path) -> list[tuple[str, float | None]]:
    """Return step and held-out KL of each check while a row was recovered; [] without recovery."""
    run = json.loads(record.read_text()) if record.exists() else {}
    return [(str(step), kl) for step, kl in run.get("recovery", {}).get("curve", [])]


def folder_of(options: argparse.Namespace, label: str) -> Path:
    """Return the folder of a row's checkpoint."""
    name: Path = options.work / "formats" / options.model / label.replace(" ", "-").replace("%", "")
    return name


def recipes_of(
    subject: Subject, tokens: int, rows: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the checked recipe of each row by its label, as `rac frontier` plans them."""
    calibration = {**subject.shared.get("calibration", {}), "tokens": tokens}
    shared = {**subject.shared, "calibration": {**calibration, "held_out_tokens": 0}}
    return {
        row.label: row.recipe for row in plan_rows(Grid(shared=shared, rows=rows), FORMATS.name)
    }


def bits_per_weight(folder: Path, model: Any) -> float:
    """Return the stored bits of the linear layers per weight; float32 counts as 16 bits.

    The models here are float32 copies of bfloat16 ones, so that a CPU is fast.
    """
    size = 0.0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if ".layers." in name and "norm" not in name:
                    size += tensor.nbytes / (2 if tensor.dtype == torch.float32 else 1)
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    return 8 * size / sum(linear.weight.numel() for linear in linears)


def traces(subject: Subject) -> list[list[int]]:
    """Return 8,192 tokens of the model's own traces, of each source the same share."""
    written = subject.shared["traces"]
    sources = list(written.get("sources", {"": written}).values())
    rows = [
        trace_dataset(
            subject.model,
            tokens=8192 // len(sources),
            problems=source["problems"],
            sampling=written["sampling"],
        )
        for source in sources
    ]
    return [ids for dataset in rows for ids in dataset["input_ids"]]


def load(folder: Path, dense: Path) -> Any:
    """Load a checkpoint in the dense model's dtype, with quantized activations where it has them.

    Other checkpoints become a plain model of the dense architecture.
    """
    import rac_modifier  # noqa: F401

    scheme = getattr(AutoConfig.from_pretrained(folder), "quantization_config", {})
    blocks = scheme.get("format", "").startswith(("nvfp", "mxfp"))  # these load in bfloat16 alone
    of_dense = AutoConfig.from_pretrained(dense).dtype
    dtype = torch.bfloat16 if blocks else of_dense
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model(torch.tensor([[0]]))  # compressed-tensors unpacks in the first call
    schemes = [getattr(module, "quantization_scheme", None) for module in model.modules()]
    if any(scheme and scheme.input_activations for scheme in schemes):
        return nn.Module.to(model, of_dense).eval()  # transformers refuses .to() of such a model
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=of_dense)
    weights = model.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return plain.eval()


def compress(model: Path, recipe: dict[str, Any], folder: Path) -> None:
    """Write the compressed checkpoint, unless it is there."""
    if (folder / "config.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    called_in_child(oneshot, str(model), str(path), str(folder))


def oneshot(model: str, recipe: str, folder: str) -> None:
    """Compress with llm-compressor in this process."""
    from llmcompressor import oneshot

    import rac_modifier  # noqa: F401

    oneshot(model=model, recipe=recipe, output_dir=folder, precision="auto")


def answers_of(
    dense: Any, tokenizer: Any, subject: Subject, options: argparse.Namespace, name: str
) -> list[TokenSequence]:
    """Return the dense model's answers to held-out prompts: ids, and where the answer starts."""
    path = options.work / f"answers-{options.model}-{name}-{options.answers}-{options.cap}.json"
    if not path.exists():
        source = ProblemSource(source=subject.evaluation["source"])
        problems = list(islice(load_problems(source, seed=1), options.answers))
        sampling = SamplingSettings(
            temperature=ANSWERS[name], top_p=0.95, max_new_tokens=options.cap, batch_size=64
        )
        path.write_text(json.dumps(sample_sequences(dense, tokenizer, problems, sampling)))
    sequences: list[TokenSequence] = json.loads(path.read_text())
    return sequences


class Answers:
    """The dense model's answers at one temperature."""

    def __init__(
        self, dense: Any, tokenizer: Any, subject: Subject, options: argparse.Namespace, name: str
    ) -> None:
        self.name, self.eos = name, dense.config.eos_token_id
        self.sequences = answers_of(dense, tokenizer, subject, options, name)
        self.reference = DenseReference(dense, self.sequences)

    def divergence(self, pruned: Any) -> dict[str, tuple[float, float | None]]:
        """Return mean KL per token, in nats, with its standard error over answers."""
        rows = self.reference.divergence_per_token(pruned, self.name)
        outside = []
        for (ids, start), row in zip(self.sequences, rows, strict=True):
            reason = "length" if ids[-1] != self.eos else "stop"
            tail = repeated_tail(tuple(ids[start:]), reason)
            outside.append(row.kl[: len(row.kl) - tail])
        overall = mean_over_tokens([row.kl for row in rows])
        return {self.name: overall, f"{self.name} outside": mean_over_tokens(outside)}
