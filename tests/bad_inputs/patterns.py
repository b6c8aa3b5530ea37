"""Mistakes about the pattern and the targets."""

from __future__ import annotations

import yaml

from tests.bad_inputs.bench import Bench, Case, Cases

CASES = Cases()

for value in (0, 1, 1.7, -0.5):
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
    CASES.append(
        Case(f'`mask_structure: "{text}"`', says, lambda b, text=text: b.check(mask_structure=text))
    )
CASES += [
    Case(
        "`mask_structure: 2:4` without quotes",
        'mask_structure: 124 is what YAML reads 2:4 as; write "2:4", in quotes',
        lambda b: b.check(mask_structure=yaml.safe_load("2:4")),
    ),
    Case(
        "a share as `mask_structure`",
        'mask_structure: 0.5 is no pattern; write "2:4", or for a share of the weights sparsity: 0.5',
        lambda b: b.check(mask_structure=0.5),
    ),
    Case(
        "neither `sparsity` nor an N:M `mask_structure`",
        'mask_structure "0:0" with no sparsity',
        lambda b: b.check(mask_structure="0:0"),
    ),
    Case(
        "a share of 0 in `allocation`",
        "name a module that is to stay dense in ignore",
        lambda b: b.check(mask_structure="0:0", sparsity=0.5, allocation={"re:.*q_proj": 0.0}),
    ),
    Case(
        "`allocation` of a module that is not there",
        "matches none of the 14 modules to be pruned",
        lambda b: b.prune_with(mask_structure="0:0", sparsity=0.5, allocation={"re:.*c_proj": 0.4}),
    ),
    Case(
        "`allocation` that leaves the other modules too little",
        "to make the average 0.2; it must lie between 0 and 1",
        lambda b: b.prune_with(mask_structure="0:0", sparsity=0.2, allocation={"re:.*mlp.*": 0.9}),
    ),
    Case("an unknown solver", "did you mean 'sparsegpt'?", lambda b: b.check(solver="sparsegtp")),
]


@CASES.case("a model whose activations overflow", "activations of 64 of 64 inputs are not finite")
def _(b: Bench) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(b.folder)
    model.model.layers[1].input_layernorm.weight.data[:] = float("inf")
    b.prune(model, settings={"calibration": {"tokens": 300, "mixture": {"prompts": 1.0}}})
