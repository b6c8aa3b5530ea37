"""KL of quantization schemes by calibration set, and whether vLLM serves their checkpoints.

python -m bench schemes --vllm .venv-serve/bin/vllm

Rows of `bench formats` are calibrated on the model's own traces, on bare prompts and on generic
text. KL is in thousandths of a nat per token. A served checkpoint passes if `rac traces collect`
would accept the server for the model that transformers loads. A finished row is not run again.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from bench.common import save
from bench.formats import ANSWERS, FORMATS, Answers, bits_per_weight, compress, load, recipes_of
from bench.grid import CALIBRATIONS, calibrated_on
from bench.models import float32_copy
from bench.server import serving
from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import TraceSettings
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.collect import collect_traces

SCHEMES = (
    "KV cache FP8",
    "FP8",
    "W8A8",
    "SmoothQuant W8A8",
    "NVFP4",
    "GPTQ MXFP4",
    "AWQ int4",
    "AutoRound int4",
    "int4 by importance",
    "GPTQ int4",
    "int4",
    "GPTQ int3",
    "int3 with zero points",
    "GPTQ int2",
    "int2 with zero points",
)
CELLS = [*((kind, "sampled") for kind in CALIBRATIONS), ("traces", "greedy")]
OPTIONS = ["--dtype", "bfloat16", "--max-model-len", "1024", "--enforce-eager"]
TINY = "--tokens 512 --answers 2 --cap 16 --labels FP8 --calibrations prompts"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--model", default="reasoner", choices=("smollm2", "reasoner"))
    parser.add_argument("--labels", nargs="+", default=SCHEMES, help="rows of bench/formats.yaml")
    parser.add_argument("--calibrations", nargs="+", choices=CALIBRATIONS, default=CALIBRATIONS)
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration")
    parser.add_argument("--answers", type=int, default=64, help="held-out prompts")
    parser.add_argument("--cap", type=int, default=512, help="most tokens of an answer or trace")
    parser.add_argument("--vllm", type=Path, help="the `vllm` of a serving environment")


def run(options: argparse.Namespace) -> None:
    """Measure the cells that are missing, and write the table of all."""
    subject = float32_copy(options.model, options.work, options.cap)
    dense_folder = Path(subject.model)
    rows = {row["label"]: row for row in yaml.safe_load(FORMATS.read_text())["rows"]}
    path = options.work / f"schemes-{options.model}.json"
    finished = json.loads(path.read_text()) if path.exists() else {}
    dense = load(dense_folder, dense_folder)
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    answers = [Answers(dense, tokenizer, subject, options, name) for name in ANSWERS]
    for label in options.labels:
        for kind in options.calibrations:
            result = finished.setdefault(label, {})
            if kind in result:
                continue
            row = rows[label] | {"label": kind, "set": calibrated_on(kind, subject)}
            folder = options.work / "schemes" / options.model / f"{label} {kind}".replace(" ", "-")
            compress(dense_folder, recipes_of(subject, options.tokens, [row])[kind], folder)
            model = load(folder, dense_folder)
            result[kind] = {}
            for dense_answers in answers:
                if (kind, dense_answers.name) in CELLS:
                    result[kind] |= dense_answers.divergence(model)
            if kind == "traces":
                result["bits"] = bits_per_weight(folder, model)
                result["served"] = options.vllm and served(model, tokenizer, folder, options.vllm)
            path.write_text(json.dumps(finished, indent=1))
    columns = {"scheme": "", "bits per weight": ".2f", "vLLM serves it": ""}
    columns |= dict.fromkeys((f"KL, {kind}, {name}" for kind, name in CELLS), ".3f")
    table = []
    for label, result in finished.items():
        values = [result.get(kind, {}).get(name) for kind, name in CELLS]
        kl = [
            value and [1000 * number for number in value if number is not None] for value in values
        ]
        served_or_not = result.get("served") and result["served"].partition(":")[0]
        table.append([label, result.get("bits"), served_or_not, *kl])
    save(options.out, f"schemes_{options.model}", subject.name, columns, table)


def served(model: Any, tokenizer: Any, folder: Path, vllm: Path) -> str:
    """Return "yes", or why `vllm serve` fails or answers otherwise than `model`."""
    store = folder.with_name(f"{folder.name}-served.jsonl")
    store.unlink(missing_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    try:
        with serving(folder, OPTIONS, log, vllm=vllm) as server:
            settings = TraceSettings(
                store=str(store),
                sampling=SamplingSettings(max_new_tokens=64),
                engine=EngineSettings(base_urls=[server.url]),
            )
            collect_traces(model, tokenizer, settings, 64)
    except RacError as error:
        return f"no: {error}"
    except SystemExit:
        cause = re.search(r"\] \w+Error: (.+)", log.read_text())
        return f"no: {cause[1] if cause else 'the server ended'}"
    return "yes"
