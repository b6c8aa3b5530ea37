"""What a user can do wrong, and what the message must say. `python tests/test_bad_inputs.py` writes docs/errors.md."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import NAME, entry, recipe, save_tiny

from rac_modifier.errors import RacError

TABLE = Path(__file__).parents[1] / "docs" / "errors.md"
HEAD = """# What can go wrong, and what it says

Every mistake below ends in a `RacError` (on the command line: one message and exit code 2) that contains the text on the right.
This table is written by `python tests/test_bad_inputs.py`, and the same file tests every row of it.

| what was done | the message says |
|---|---|
"""


class Bench:
    """What the cases work with: a tiny model, a copy of its trace store, and the ways in."""

    def __init__(self, folder: Path, store: Path, tmp: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.tmp, self.monkeypatch = folder, tmp, monkeypatch
        self.store = tmp / "traces.jsonl"
        shutil.copy(store, self.store)

    def check(self, **settings: Any) -> None:
        """Validate a recipe entry, as every way in does."""
        from rac_modifier.recipe import check_entry

        check_entry({"mask_structure": "2:4", **settings}, "recipe.yaml")

    def prune(self, model: Any = None, later: tuple[Any, ...] = (), **options: Any) -> None:
        """Run oneshot with a modifier object; `settings` of ours in `options["settings"]`."""
        from llmcompressor import oneshot

        from rac_modifier import ReasoningAwareSparseGPTModifier

        ours = ReasoningAwareSparseGPTModifier(**entry(self.store, **options.pop("settings", {})))
        oneshot(model=str(self.folder) if model is None else model, recipe=[ours, *later], **options)

    def prune_with(self, **settings: Any) -> None:
        self.prune(settings=settings)

    def rac(self, *args: Any) -> None:
        """Run the command, its errors let through."""
        from rac_modifier import cli

        cli.app([str(arg) for arg in args], standalone_mode=False)

    def rac_prune(self, text: str | None = None, out: str = "out", model: Any = None, *options: str) -> None:
        path = self.tmp / "recipe.yaml"
        path.write_text(recipe(entry(self.store)) if text is None else text)
        self.rac("prune", self.folder if model is None else model, self.tmp / out, "-r", path, *options)

    def problems(self, *rows: dict[str, Any], **source: Any) -> dict[str, Any]:
        """Trace settings whose problems are a file of these rows."""
        path = self.tmp / "problems.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = entry(self.tmp / "new.jsonl")["traces"]
        return {**settings, "problems": {"source": str(path), **source}}


@dataclass(frozen=True)
class Case:
    did: str
    says: str
    run: Callable[[Bench], Any]


CASES: list[Case] = []


def case(did: str, says: str) -> Callable[[Callable[[Bench], Any]], Callable[[Bench], Any]]:
    def add(run: Callable[[Bench], Any]) -> Callable[[Bench], Any]:
        CASES.append(Case(did, says, run))
        return run

    return add


# --- the pattern and the targets ---

for value in (0, 1, 1.7, float("nan"), -0.5):
    CASES.append(
        Case(
            f"`sparsity: {value}`",
            f"sparsity {float(value)}: must lie strictly between 0 and 1",
            lambda b, value=value: b.check(mask_structure="0:0", sparsity=value),
        )
    )
for text, says in (
    ("5:4", 'mask_structure "5:4": prunes 5 of every 4'),
    ("a:b", "mask_structure 'a:b': not of the form \"N:M\""),
    ("4:4", "N must be at least 1 and less than M"),
):
    CASES.append(Case(f'`mask_structure: "{text}"`', says, lambda b, text=text: b.check(mask_structure=text)))
CASES += [
    Case(
        "`mask_structure` and `sparsity` that disagree",
        'sparsity 0.7 contradicts mask_structure "2:4"',
        lambda b: b.check(sparsity=0.7),
    ),
    Case(
        "neither `sparsity` nor an N:M `mask_structure`",
        'mask_structure "0:0" with no sparsity',
        lambda b: b.check(mask_structure="0:0"),
    ),
    Case(
        "N:M where a layer's inputs are no multiple of M",
        "inputs are no multiple of 7",
        lambda b: b.prune_with(mask_structure="3:7"),
    ),
    Case("targets that match nothing", "match no linear layer", lambda b: b.prune_with(targets=["Linaer"])),
    Case(
        "a target that is no Linear",
        "model.embed_tokens, a Embedding; only Linear layers are pruned",
        lambda b: b.prune_with(targets=["model.embed_tokens"]),
    ),
    Case("an unknown solver", "Input should be 'sparsegpt', 'wanda' or 'magnitude'", lambda b: b.check(solver="alps")),
]


@case("`lm_head` in targets of a model that ties it", "shares its weight with the input embedding")
def _(b: Bench) -> None:
    tied = save_tiny(b.tmp / "tied", tie_word_embeddings=True)
    b.prune(str(tied), settings={"targets": ["lm_head"]})


@case("a model with weights that are not finite", "the weight holds values that are not finite; check the checkpoint")
def _(b: Bench) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(b.folder)
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = float("inf")
    b.prune(model, settings={"calibration": {"tokens": 300, "mixture": {"prompts": 1.0}}})


@case("a model whose activations overflow", "activations of 64 of 64 inputs are not finite")
def _(b: Bench) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(b.folder)
    model.model.layers[1].input_layernorm.weight.data[:] = float("inf")
    b.prune(model, settings={"calibration": {"tokens": 300, "mixture": {"prompts": 1.0}}})


# --- the calibration set ---

CASES += [
    Case(
        "shares that do not sum to 1",
        "sum to 0.9; make them sum to 1",
        lambda b: b.check(calibration={"mixture": {"traces": 0.5, "prompts": 0.4}}),
    ),
    Case(
        "an unknown kind in the mixture",
        "mixture names 'thoughts'; the kinds are traces, prompts, generic",
        lambda b: b.check(calibration={"mixture": {"thoughts": 1.0}}),
    ),
    Case(
        "a negative token weight",
        "prompt_weight is -1.0; use a finite number of at least 0",
        lambda b: b.check(calibration={"prompt_weight": -1}),
    ),
    Case(
        "`trace_weight: 0` with traces in the mixture",
        "no chain-of-thought token would reach the Hessian",
        lambda b: b.check(calibration={"trace_weight": 0}),
    ),
    Case(
        "generic text without its column",
        "needs the name of its text column",
        lambda b: b.prune_with(
            calibration={"mixture": {"generic": 1.0}, "generic": {"source": "some/dataset"}, "tokens": 300}
        ),
    ),
    Case(
        "too little generic text",
        "the generic part of the calibration set has",
        lambda b: b.prune_with(calibration={"mixture": {"generic": 1.0}, "tokens": 10**9}),
    ),
]


@case("a budget larger than the problems give", "are used up")
def _(b: Bench) -> None:
    b.prune_with(traces=b.problems({"problem": "1+1?"}, {"problem": "2+2?"}))


@case("traces cut to their prompts by `max_sequence_tokens`", "no token of any")
def _(b: Bench) -> None:
    rows = [{"problem": f"{i} what is " + "1 + " * 30 + "1?"} for i in range(20)]
    b.prune_with(traces=b.problems(*rows), calibration={"tokens": 150, "max_sequence_tokens": 16})


# --- problems and models ---

CASES += [
    Case(
        "a column that the problem file lacks",
        "has no column 'quest'; its columns are: problem",
        lambda b: b.prune_with(traces=b.problems({"problem": "1+1?"}, column="quest")),
    ),
    Case(
        "a problem file of unknown columns, none named",
        "which column holds the question? Set `column` to one of: text",
        lambda b: b.prune_with(traces=b.problems({"text": "1+1?"})),
    ),
    Case("an empty problem file", "holds no problems", lambda b: b.prune_with(traces=b.problems())),
    Case(
        "a problem file that is not there",
        "no such file; check the path",
        lambda b: b.prune_with(traces={"problems": {"source": "nowhere.jsonl"}, "store": str(b.tmp / "new.jsonl")}),
    ),
    Case(
        "an unknown reasoning-gym task",
        "unknown reasoning-gym task 'chain_sums'; did you mean chain_sum",
        lambda b: b.prune_with(
            traces={"problems": {"source": "reasoning-gym:chain_sums"}, "store": str(b.tmp / "new.jsonl")}
        ),
    ),
    Case("a model that is not there", "no model at", lambda b: b.rac_prune(model="./no-such-model")),
    Case(
        "a tokenizer that is not there",
        "name one in the recipe (tokenizer: path or id)",
        lambda b: b.prune_with(tokenizer="./no-such-tokenizer"),
    ),
    Case(
        "evaluating on problems without answers",
        "problems have no answer to check against",
        lambda b: b.rac(
            "eval", b.folder, "--source", b.problems({"problem": "1+1?"})["problems"]["source"], "--problems", 1
        ),
    ),
    Case(
        "evaluating on more problems than there are",
        "gave 1 problems of the 5 asked for",
        lambda b: b.rac(
            "eval", b.folder, "--source", b.problems({"problem": "1+1?"})["problems"]["source"], "--problems", 5
        ),
    ),
]


@case("a dataset that cannot be loaded", "none of which needs a download")
def _(b: Bench) -> None:
    import datasets

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")

    b.monkeypatch.setattr(datasets, "load_dataset", fail)
    b.prune_with(traces={"problems": {"source": "some/dataset"}, "store": str(b.tmp / "new.jsonl")})


@case("a model whose tokenizer has no chat template", "has no chat template; set template='none'")
def _(b: Bench) -> None:
    bare = save_tiny(b.tmp / "bare", chat_template=None)
    b.prune(str(bare), settings={"traces": {"store": str(b.tmp / "new.jsonl")}})


# --- the trace store ---


@case("a store of another model's traces", "A model is best calibrated on its own traces")
def _(b: Bench) -> None:
    b.prune(str(save_tiny(b.tmp / "other", seed=1)))


@case("a store that was filled under other settings", "sampling.max_new_tokens: 40 in the store, 41 asked for")
def _(b: Bench) -> None:
    b.prune_with(traces={"store": str(b.store), "sampling": {"temperature": 1.0, "max_new_tokens": 41}})


@case("a store with a corrupt line", "line 5 is corrupt: checksum or layout is wrong. Remove that line")
def _(b: Bench) -> None:
    lines = b.store.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b"completion_ids", b"completion_idz")
    b.store.write_bytes(b"".join(lines))
    b.prune()


@case("a store whose first line is damaged", "is no trace store, or its first line is corrupt")
def _(b: Bench) -> None:
    b.store.write_bytes(b.store.read_bytes()[20:])
    b.prune()


@case("another file in the place of the store", "is no trace store; name another path")
def _(b: Bench) -> None:
    b.store.write_text("my diary")
    b.prune()


@case("looking into an empty store", "holds no header; collect traces first")
def _(b: Bench) -> None:
    b.store.write_bytes(b"")
    b.rac("traces", "inspect", b.store)


@case("a store that another process fills", "is in use by another process")
def _(b: Bench) -> None:
    with b.store.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        b.prune()


@case("no room on disk while sampling", "make room, then run again to go on from there")
def _(b: Bench) -> None:
    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    lines = b.store.read_bytes().splitlines(keepends=True)
    b.store.write_bytes(b"".join(lines[:3]))
    b.monkeypatch.setattr(os, "write", full)
    b.prune()


@case("collecting for a recipe without traces", "so there is nothing to collect")
def _(b: Bench) -> None:
    path = b.tmp / "r.yaml"
    path.write_text(recipe({"sparsity": 0.5, "calibration": {"mixture": {"generic": 1.0}}}))
    b.rac("traces", "collect", b.folder, "-r", path)


# --- the recipe and the run ---

CASES += [
    Case(
        "a recipe that is not there", "no recipe at", lambda b: b.rac("prune", b.folder, b.tmp / "o", "-r", "no.yaml")
    ),
    Case("a recipe that is not YAML", "is not YAML", lambda b: b.rac_prune("pruning_stage: [")),
    Case(
        "a setting that does not exist",
        "calibration.token: there is no such setting (value 5)",
        lambda b: b.check(calibration={"token": 5}),
    ),
    Case(
        "a recipe without this modifier",
        f"has no {NAME}",
        lambda b: b.rac_prune("s_stage: {m_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}"),
    ),
    Case(
        "a stage without its suffix, which llm-compressor overlooks",
        "llm-compressor would overlook pruning: pruning_modifiers",
        lambda b: b.rac_prune(f"pruning: {{pruning_modifiers: {{{NAME}: {{sparsity: 0.5}}}}}}"),
    ),
    Case("`--set` without a value", "is not key=value", lambda b: b.rac_prune(None, "o", None, "-s", "sparsity")),
    Case(
        '`oneshot(pipeline="basic")`',
        'pipeline="basic" does not prune layer by layer',
        lambda b: b.prune(pipeline="basic"),
    ),
]


@case("`oneshot(dataset=...)` beside the recipe", "leave the dataset argument out")
def _(b: Bench) -> None:
    import torch
    from torch.utils.data import DataLoader

    b.prune(dataset=DataLoader([{"input_ids": torch.arange(2, 20)}], batch_size=1), num_calibration_samples=1)


@case("this modifier twice in one recipe", f"the recipe has two {NAME}")
def _(b: Bench) -> None:
    from rac_modifier import ReasoningAwareSparseGPTModifier

    b.prune(later=(ReasoningAwareSparseGPTModifier(**entry(b.store)),))


@case("torchrun with several processes", "does not run under torchrun yet")
def _(b: Bench) -> None:
    b.monkeypatch.setenv("WORLD_SIZE", "2")
    b.prune()


# --- the checkpoint ---


@case("an output folder that is in use", "is in use; name an empty or a new one")
def _(b: Bench) -> None:
    (b.tmp / "out").mkdir()
    (b.tmp / "out" / "notes.txt").write_text("mine")
    b.rac_prune()


@case("an output that is a file", "is a file; name a folder")
def _(b: Bench) -> None:
    (b.tmp / "out").write_text("mine")
    b.rac_prune()


@case("no room on disk for the checkpoint", "GiB are free, the checkpoint needs up to")
def _(b: Bench) -> None:
    usage = namedtuple("usage", "total used free")
    b.monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
    b.rac_prune()


@case("`GPTQModifier` W4A16 after 2:4 pruning", "no longer holds its pattern")
def _(b: Bench) -> None:
    from llmcompressor.modifiers.quantization import GPTQModifier

    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
    gptq = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": group})
    b.prune(later=(gptq,), output_dir=str(b.tmp / "out"))


@case("loading a checkpoint with a damaged packed weight", "model.layers.0.mlp.up_proj")
def _(b: Bench) -> None:
    from safetensors.torch import load_file, save_file

    from rac_modifier import load_model

    b.prune(output_dir=str(b.tmp / "out"))
    tensors = load_file(b.tmp / "out" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bitmask"][0, 0] = 255
    save_file(tensors, b.tmp / "out" / "model.safetensors", {"format": "pt"})
    load_model(b.tmp / "out")


@case("looking into a folder that is not there", "is this a saved model folder?")
def _(b: Bench) -> None:
    b.rac("inspect", b.tmp / "nowhere")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.did)
def test_the_message_says_what_is_wrong(case, tiny_folder, trace_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench = Bench(tiny_folder, trace_store, tmp_path, monkeypatch)
    with pytest.raises(RacError) as caught:
        case.run(bench)
    assert case.says in str(caught.value)


def errors_table() -> str:
    rows = [f"| {c.did} | {c.says.replace('|', chr(92) + '|')} |" for c in CASES]
    return HEAD + "\n".join(rows) + "\n"


def test_no_case_is_there_twice():
    assert len({c.did for c in CASES}) == len(CASES) >= 25


def test_the_published_table_is_that_of_the_tests():
    """If this fails: python tests/test_bad_inputs.py."""
    assert TABLE.read_text() == errors_table()


if __name__ == "__main__":
    sys.stdout.write(f"{TABLE}: {TABLE.write_text(errors_table())} characters\n")
