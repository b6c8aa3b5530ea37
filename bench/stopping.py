"""How answers of compressed models end, and how many vLLM's repetition detection would end.

    python -m bench formats --labels int4 "50 % + int4"     # makes the models
    python -m bench stopping --labels int4 "50 % + int4"

`rac eval --stopping` samples the dense model and each row of `bench formats`; answers are kept and
not sampled again. The detection is vLLM's `repetition_detection` with three copies of a pattern of
8 to 128 tokens, applied to the kept answers.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from bench.common import RAC, save
from bench.formats import folder_of
from bench.models import float32_copy
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.traces.store import TraceStore

COLUMNS = {
    "row": "",
    "temperature": "",
    "truncated, %": ".1f",
    "looping, %": ".1f",
    "truncated, alone and dense alone": "",
    "McNemar p": ".2g",
    "token inflation, both finish": ".2f",
    "token inflation, all at the cap": ".2f",
    "detected of the truncated": "",
    "detected of the finished": "",
}
COPIES, SHORTEST, LONGEST = 3, 8, 128
TINY = "--model reasoner --labels --temperatures 0 --answers 2 --cap 16"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "reasoner"))
    parser.add_argument("--labels", nargs="*", default=["int4"], help="finished bench formats rows")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.6])
    parser.add_argument("--answers", type=int, default=256, help="held-out prompts")
    parser.add_argument("--cap", type=int, default=512, help="most tokens of an answer")


def run(options: argparse.Namespace) -> None:
    """Sample what is missing, and write the table."""
    subject = float32_copy(options.model, options.work, options.cap)
    few = options.answers <= subject.evaluation["problems"]
    source = subject.evaluation["source"] if few else subject.more_held_out
    work = options.work.resolve() / f"stopping-{options.answers}"
    work.mkdir(parents=True, exist_ok=True)
    models = {"dense": Path(subject.model).resolve()}
    models |= {label: folder_of(options, label).resolve() for label in options.labels}
    rows = []
    for temperature in options.temperatures:
        report = work / f"{temperature}.json"
        command = [*RAC, "eval", *map(str, models.values()), "--stopping", "--json", str(report)]
        command += ["--source", source, "--problems", str(options.answers)]
        command += ["--cap", str(options.cap), "--temperature", str(temperature)]
        command += ["--precision", "float32", "--batch-size", "64"]
        subprocess.run(command, check=True, cwd=work)
        report_of = json.loads(report.read_text())
        pairs = {pair["second"]: pair for pair in report_of.get("paired", [])}
        stores = map(TraceStore.read, (work / "rac_answers").glob("*.jsonl"))
        detected = {
            store.header.fingerprint: detections(store)
            for store in stores
            if store.header.sampling.temperature == temperature
        }
        results = zip(models, report_of["results"], report_of["stopping"], strict=True)
        for label, result, ends in results:
            pair = pairs.get(result["label"], {})
            inflation = pair.get("inflation", {})
            alone = [pair.get(f"truncated_only_{which}") for which in ("second", "first")]
            fingerprint = ModelIdentity.of_files(str(models[label])).fingerprint
            rows.append(
                [
                    label,
                    f"{temperature:g}",
                    100 * result["unfinished_share"],
                    100 * ends["looping"],
                    f"{alone[0]}, {alone[1]}" if pair else None,
                    pair.get("truncated_p_value"),
                    ratio(inflation.get("both_finish")),
                    ratio(inflation.get("at_cap")),
                    *detected[fingerprint],
                ]
            )
    save(options.out, f"stopping_{options.model}_{options.answers}", subject.name, COLUMNS, rows)


def ratio(inflation: dict[str, Any] | None) -> list[float] | None:
    """Return a ratio of tokens with its interval."""
    return inflation and [inflation[key] for key in ("ratio", "ci_low", "ci_high")]


def detections(store: TraceStore) -> tuple[str, str]:
    """Count the answers that the detection ends, of the truncated and of the finished."""
    counts = {"length": [0, 0], "stop": [0, 0]}
    for answer in store:
        count = counts[answer.finish_reason]
        count[0] += is_detected(answer.completion_ids)
        count[1] += 1
    truncated, finished = (f"{detected} of {of}" for detected, of in counts.values())
    return truncated, finished


def is_detected(ids: tuple[int, ...]) -> bool:
    """Return whether some prefix ends in copies of a pattern, as vLLM looks for them."""
    for length in range(SHORTEST, LONGEST + 1):
        alike = 0  # tokens in a row that equal the token one pattern before
        for before, token in zip(ids, ids[length:], strict=False):
            alike = alike + 1 if before == token else 0
            if alike == length * (COPIES - 1):
                return True
    return False
