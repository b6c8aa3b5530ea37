"""Mistakes about the run: what `oneshot` is given beside the recipe, and where the result goes."""

from __future__ import annotations

import torch

from tests.bad_inputs.bench import Bench, Cases
from tests.tiny import NAME, entry, tiny_tokenizer

CASES = Cases()


@CASES.case("`oneshot(dataset=...)` beside the recipe", "leave the dataset argument out")
def _(b: Bench) -> None:
    from torch.utils.data import DataLoader

    b.prune(dataset=DataLoader([{"input_ids": torch.arange(2, 20)}], batch_size=1))


@CASES.case(
    "`oneshot(num_calibration_samples=...)` beside the recipe",
    "leave the num_calibration_samples argument out; set calibration.tokens in the recipe",
)
def _(b: Bench) -> None:
    b.prune(num_calibration_samples=64)


@CASES.case(
    "`oneshot(max_seq_length=...)` beside the recipe",
    "leave the max_seq_length argument out; set calibration.max_sequence_tokens in the recipe",
)
def _(b: Bench) -> None:
    b.prune(max_seq_length=2048)


@CASES.case("a tokenizer in `oneshot` and another in the recipe", "leave one of them out")
def _(b: Bench) -> None:
    tiny_tokenizer().save_pretrained(b.tmp / "other")
    b.prune(
        settings={"tokenizer": str(b.folder / ".." / b.folder.name)}, tokenizer=str(b.tmp / "other")
    )


@CASES.case(
    "`oneshot(output_dir=...)` with a folder that is not empty",
    "is in use; name an empty or a new one",
)
def _(b: Bench) -> None:
    b.prune(output_dir=str(b.tmp))


@CASES.case(
    "an output folder below a file",
    "traces.jsonl is a file, so no folder can be made in it; name another",
)
def _(b: Bench) -> None:
    b.rac_prune(out="traces.jsonl/out")


@CASES.case("more tokens than fit into memory", "set a lower calibration.tokens")
def _(b: Bench) -> None:
    b.monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**20}))
    b.prune()


@CASES.case("this modifier twice in one recipe", f"the recipe has two {NAME}")
def _(b: Bench) -> None:
    from rac_modifier import ReasoningAwareSparseGPTModifier

    b.prune(later=(ReasoningAwareSparseGPTModifier(**entry(b.store)),))
