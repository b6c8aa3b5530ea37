"""Mistakes about packing and unpacking."""

from __future__ import annotations

import json
from pathlib import Path

from tests.bad_inputs.bench import Bench, Cases

CASES = Cases()


def sparse(b: Bench, shard: str | None = None) -> Path:
    """The tiny model with every linear layer 2:4, stored dense."""
    from transformers import AutoModelForCausalLM

    from tests.tiny import linears

    model = AutoModelForCausalLM.from_pretrained(b.folder)
    for linear in linears(model).values():
        linear.weight.data.view(-1, 4)[:, 1:3] = 0
    model.save_pretrained(b.tmp / "sparse", **({"max_shard_size": shard} if shard else {}))
    return b.tmp / "sparse"


@CASES.case("`rac pack` of a dense model", "nothing to pack: no module would get smaller")
def _(b: Bench) -> None:
    b.rac("pack", b.folder, b.tmp / "out")


@CASES.case("`rac pack` of a model with NaN", "model.norm.weight: holds values that are not finite")
def _(b: Bench) -> None:
    from safetensors.torch import load_file, save_file

    file = sparse(b) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    b.rac("pack", file.parent, b.tmp / "out")


@CASES.case("`rac pack` of a download that was cut off in a file", "cannot be read as safetensors")
def _(b: Bench) -> None:
    file = sparse(b) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    b.rac("pack", b.tmp / "sparse", b.tmp / "out")


@CASES.case("a packed checkpoint of a newer version", "a newer version wrote it: pip install -U")
def _(b: Bench) -> None:
    b.rac("pack", sparse(b), b.tmp / "out")
    config = json.loads((b.tmp / "out" / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["version"] = 99
    (b.tmp / "out" / "config.json").write_text(json.dumps(config))
    b.rac("unpack", b.tmp / "out", b.tmp / "again")


@CASES.case(
    "`rac pack` of a model that another method quantized",
    "only compressed-tensors checkpoints can be packed",
)
def _(b: Bench) -> None:
    config = json.loads((sparse(b) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (b.tmp / "sparse" / "config.json").write_text(json.dumps(config))
    b.rac("pack", b.tmp / "sparse", b.tmp / "out")


@CASES.case(
    "two processes that write to one folder",
    "another process is writing to it; wait for that one to end",
)
def _(b: Bench) -> None:
    from rac_modifier.checkpoint.output_folder import new_files

    with new_files(b.tmp / "out"):
        b.rac("pack", sparse(b), b.tmp / "out")


@CASES.case(
    "`rac pack` into the folder of the model", "is the model itself, which is left as it is"
)
def _(b: Bench) -> None:
    b.rac("pack", sparse(b), b.tmp / "sparse")


@CASES.case(
    "`rac pack` of what is packed already", "is packed already; start from the dense checkpoint"
)
def _(b: Bench) -> None:
    b.rac("pack", sparse(b), b.tmp / "out")
    b.rac("pack", b.tmp / "out", b.tmp / "again")


@CASES.case(
    "`rac unpack` of what is not packed", "is not packed, so stock loaders read it as it is"
)
def _(b: Bench) -> None:
    b.rac("unpack", b.folder, b.tmp / "out")
