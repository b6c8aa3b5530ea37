"""Pruning time, error and peak memory: our presets and llm-compressor on the same batches.

    python -m bench time --who upstream paper quality
    python -m bench time --cases 7B --layers 1 --tokens 131072 --rounds 1

Contenders run in turn, each in a process of its own, on the same float32 model and the same
rows of tokens without padding. Time is for the whole `oneshot` call. The error compares
the last hidden state with the dense model's.
"""

import argparse
import copy
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import called_in_child, in_turn, ratios, save, spread
from bench.grid import VARIANTS
from bench.grid import pattern as settings_of
from bench.shapes import QWEN2

UPSTREAM = "upstream"
ROW = 256  # tokens of a calibration sequence
TINY = "--cases reasoner --who upstream paper --tokens 512 --rounds 1 --patterns 2:4"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    who = [UPSTREAM, *VARIANTS]
    cases = ["reasoner", *QWEN2]
    parser.add_argument("--cases", nargs="+", choices=cases, default=["reasoner", "1.5B"])
    parser.add_argument("--layers", type=int, default=2, help="of the shapes 1.5B and 7B")
    parser.add_argument("--patterns", nargs="+", choices=["2:4", "0:0"], default=["0:0"])
    parser.add_argument("--who", nargs="+", choices=who, default=[UPSTREAM, "paper", "quality"])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)


def model_and_rows(
    case: str, layers: int, tokens: int, folder: Path
) -> tuple[Any, list[list[int]]]:
    """Return a float32 model and rows of token ids: random, or solutions for the reasoner.

    `oneshot` reads the config and tokenizer of a random model in `folder`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    import rac_modifier
    from rac_modifier.problems import arithmetic
    from training.arithmetic_thinking import thinking_of

    torch.manual_seed(0)
    path = rac_modifier.reasoner_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if case != "reasoner":
        config = Qwen2Config(vocab_size=4096, num_hidden_layers=layers, **QWEN2[case])
        ids = torch.randint(0, 4096, (tokens // ROW, ROW)).tolist()
        model = Qwen2ForCausalLM(config)
        for part in (config, tokenizer):
            part.save_pretrained(folder)
        model.config.name_or_path = str(folder)
        return model, ids
    stream: list[int] = []
    for problem in arithmetic.generate("bench", "calibration"):
        text = f"{problem.question}\n{thinking_of(problem)}"
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(stream) >= tokens:
            break
    ids = [stream[at : at + ROW] for at in range(0, tokens - ROW + 1, ROW)]
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), ids


def prune(
    case: str, layers: int, pattern: str, who: str, tokens: int, folder: Path
) -> dict[str, float]:
    """Prune in this process; return seconds, CPU seconds, the error and the added memory."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    import rac_modifier
    from rac_modifier.calibration.calibration_set import CalibrationSet
    from rac_modifier.calibration.loader import CalibrationLoader
    from rac_modifier.calibration.mixture import CalibrationSequence
    from rac_modifier.settings.calibration import CalibrationSettings

    model, ids = model_and_rows(case, layers, tokens, folder)
    dense = copy.deepcopy(model)
    sequences = [CalibrationSequence(tuple(row), 0, "traces") for row in ids]
    settings = CalibrationSettings(batch_tokens=4096)
    loader = CalibrationLoader.of(sequences, settings)
    if who == UPSTREAM:
        recipe = SparseGPTModifier(sparsity=0.5, mask_structure=pattern, ignore=["re:.*lm_head"])
        batches = [dict(batch) for batch in loader]
        call = partial(oneshot, dataset=torch.utils.data.DataLoader(batches, batch_size=None))
    else:
        share = settings_of("0.5" if pattern == "0:0" else pattern)
        recipe = rac_modifier.ReasoningAwareSparseGPTModifier(**share, **VARIANTS[who])
        recipe.use_calibration_set(CalibrationSet(loader))
        call = oneshot
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = resident("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    call(model=model, recipe=recipe)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resident("VmHWM") - before
    with torch.no_grad():
        batch = torch.tensor(ids[:16])
        exact, pruned = (net.model(batch).last_hidden_state for net in (dense, model))
    error = float((pruned - exact).square().sum() / exact.square().sum())
    return {"seconds": seconds, "cpu": cpu, "error": error, "mib": peak}


def resident(field: str) -> float:
    """Return this process's memory in MiB: VmRSS: now, VmHWM: the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def run(options: argparse.Namespace) -> None:
    """Run the contenders of each case in turn and write the table."""
    rows = []
    for case in options.cases:
        for pattern in options.patterns:
            call = partial(called_in_child, prune, case, options.layers, pattern)
            folder = options.work / f"time-{case}"
            runs = {who: partial(call, who, options.tokens, folder) for who in options.who}
            results = in_turn(runs, options.rounds)
            share = "50 %" if pattern == "0:0" else pattern
            label = f"{case}, {share}, {options.tokens:,} tokens"
            first = [run["seconds"] for run in next(iter(results.values()))]
            for who, measured in results.items():
                seconds, cpu = ([run[key] for run in measured] for key in ("seconds", "cpu"))
                last = (measured[-1]["error"], measured[-1]["mib"])
                rows.append(
                    [label, who, spread(seconds), ratios(seconds, first), spread(cpu), *last]
                )
    columns = {
        "case": "",
        "who": "",
        "seconds": ".1f",
        "ratio": ".2f",
        "CPU seconds": ".0f",
        "relative error": ".5f",
        "peak memory over the start, MiB": ",.0f",
    }
    save(options.out, "time", "reasoner; Qwen2 shapes with random weights", columns, rows)
