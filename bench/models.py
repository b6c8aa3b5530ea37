"""The models that suites measure, with their problems: the embedded reasoner, SmolLM2, Qwen2.5."""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.offgrid import build
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.problems.source import load_problems
from rac_modifier.reasoner import reasoner_path
from rac_modifier.settings.problems import ARITHMETIC, ProblemSource

PROMPTS = Path(__file__).with_name("prompts.yaml")


@dataclass(frozen=True)
class Subject:
    """A model that answers, and the parts of a grid that belong to it."""

    name: str  # in tables
    model: str  # hub id, folder, or "reasoner"
    shared: dict[str, Any]  # traces and calibration
    evaluation: dict[str, Any]
    more_held_out: str = ARITHMETIC  # source of prompts, for answers that are not graded
    dtype: torch.dtype = torch.float32  # of the copy that suites measure


def reasoner(work: Path) -> Subject:
    """Return the embedded reasoner on its arithmetic problems."""
    traces = {"problems": {"source": "arithmetic"}, "sampling": {"max_new_tokens": 512}}
    evaluation = {"source": "arithmetic", "problems": 300, "cap": 512, "batch_size": 256}
    name = "embedded reasoner (3.4 M parameters)"
    return Subject(name, "reasoner", {"traces": traces}, evaluation)


def smollm2(work: Path) -> Subject:
    """Return SmolLM2-135M-Instruct off its 4-bit grid, on instructions and arithmetic."""
    folder = work / "smollm2"
    if not (folder / "config.json").exists():
        build("smollm2", folder)
    train, held_out = work.resolve() / "train.jsonl", work.resolve() / "held_out.jsonl"
    instructions = list(islice(prompts(held_out=False), 6000))
    write_prompts(train, instructions)
    chat = list(islice(prompts(held_out=True), 128))
    sums = [problem.question for problem in held_out_problems("arithmetic", 128, seed=1)]
    write_prompts(held_out, [*chat[:32], *sums[:32]])
    more = work.resolve() / "held_out_256.jsonl"
    write_prompts(more, [*chat[:32], *sums[:32], *chat[32:], *sums[32:]])
    fresh = islice(load_problems(ProblemSource(source="arithmetic"), seed=7), 4000)
    more_sums = [text for text in dict.fromkeys(p.question for p in fresh) if text not in sums]
    in_turn = zip(instructions[3000:], more_sums[:2500], strict=False)
    write_prompts(work.resolve() / "in_turn.jsonl", [text for pair in in_turn for text in pair])
    sampling = {"max_new_tokens": 1024, "batch_size": 64, "seed": 0}
    named = {"instructions": str(train), "arithmetic": "arithmetic"}
    sources = {name: {"problems": {"source": source}} for name, source in named.items()}
    mixture = {f"traces:{source}": 0.5 for source in sources}
    traces = {"sampling": sampling, "sources": sources}
    shared = {"traces": traces, "calibration": {"mixture": mixture}}
    evaluation = {"source": str(held_out), "problems": 64, "cap": 1024}
    name = "SmolLM2-135M off its grid"
    return Subject(name, str(folder), shared, evaluation, str(more))


def qwen15b(work: Path) -> Subject:
    """Return Qwen2.5-Coder-1.5B-Instruct off its 4-bit grid, bfloat16, on word problems."""
    folder = work / "qwen15b"
    if not (folder / "config.json").exists():
        build("qwen15b", folder, work / "wheels")
    source, held_out = "reasoning-gym:gsm_symbolic", work.resolve() / "words_held_out.jsonl"
    write_prompts(held_out, [p.question for p in held_out_problems(source, 64)])
    sampling = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "batch_size": 32, "seed": 0}
    traces = {"problems": {"source": source}, "sampling": sampling}
    traces["store"] = str(work.resolve() / "qwen15b-store.jsonl")
    evaluation = {"source": str(held_out), "problems": 64, "cap": 512}
    name = "Qwen2.5-Coder-1.5B-Instruct off its grid"
    return Subject(name, str(folder), {"traces": traces}, evaluation, dtype=torch.bfloat16)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "reasoner": reasoner,
    "smollm2": smollm2,
    "qwen15b": qwen15b,
}


def float32_copy(name: str, work: Path, cap: int) -> Subject:
    """Return a subject whose model is a folder of its dtype, with traces of at most `cap` tokens.

    That is float32, since a CPU is fast with it; Qwen2.5 stays bfloat16, since memory has an end.
    """
    subject = SUBJECTS[name](work)
    folder = work / f"{name}-float32" if subject.dtype == torch.float32 else Path(subject.model)
    if not (folder / "config.json").exists():
        source = reasoner_path() if subject.model == "reasoner" else subject.model
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        model.save_pretrained(folder)
    subject.shared["traces"]["sampling"]["max_new_tokens"] = cap
    return replace(subject, model=str(folder))


def write_prompts(path: Path, texts: list[str]) -> None:
    """Write prompts as a JSONL file with the column "problem"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"problem": text}) + "\n" for text in texts))


def prompts(held_out: bool) -> Iterator[str]:
    """Yield distinct prompts; training and held-out ones share neither templates nor fillers."""
    content = yaml.safe_load(PROMPTS.read_text())
    templates = [text for at, text in enumerate(content["templates"]) if (at % 4 == 3) == held_out]
    fillers: dict[str, list[Any]] = {}
    for kind, values in content["fillers"].items():
        cut = len(values) - len(values) // 4
        fillers[kind] = values[cut:] if held_out else values[:cut]
    draw, seen, repeats = random.Random(f"0/{held_out}"), set(), 0
    while repeats < 1000:
        for template in draw.sample(templates, len(templates)):
            text = re.sub(r"\{(\w+)\}", lambda slot: str(draw.choice(fillers[slot[1]])), template)
            repeats = repeats + 1 if text in seen else 0
            if text not in seen:
                seen.add(text)
                yield text
