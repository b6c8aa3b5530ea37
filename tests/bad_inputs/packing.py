"""Mistakes about packing and unpacking."""

import json
from pathlib import Path

from tests.bad_inputs.bench import Bench, Cases

CASES = Cases()


def sparse(b: Bench) -> Path:
    """The tiny model with every linear layer 2:4, stored dense."""
    from transformers import AutoModelForCausalLM

    from tests.tiny import linears

    model = AutoModelForCausalLM.from_pretrained(b.folder)
    for linear in linears(model).values():
        linear.weight.data.view(-1, 4)[:, 1:3] = 0
    model.save_pretrained(b.tmp / "sparse")
    return b.tmp / "sparse"


@CASES.case("`rac pack` of a download that was cut off in a file", "cannot be read as safetensors")
def _(b: Bench) -> None:
    file = sparse(b) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    b.rac("pack", b.tmp / "sparse", b.tmp / "out")


@CASES.case(
    "`rac pack` of a model that another method quantized",
    "only compressed-tensors models can be packed",
)
def _(b: Bench) -> None:
    config = json.loads((sparse(b) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (b.tmp / "sparse" / "config.json").write_text(json.dumps(config))
    b.rac("pack", b.tmp / "sparse", b.tmp / "out")


@CASES.case("`rac pack` of what is packed already", "is packed already; start from")
def _(b: Bench) -> None:
    b.rac("pack", sparse(b), b.tmp / "out")
    b.rac("pack", b.tmp / "out", b.tmp / "again")
