"""Tiny random models of each architecture, pruned to 2:4, saved and loaded back.

`python -m tests.llmcompressor.test_architectures` writes the table of docs/your-model.md.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from rac_modifier import RacError, load_model
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from tests.tiny import SIZES, entry, recipe, tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "your-model.md"
MARKS = (
    "<!-- architectures: python -m tests.llmcompressor.test_architectures -->\n",
    "<!-- end of architectures -->\n",
)
DENSE = {"intermediate_size": 128}
EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 32, "moe_intermediate_size": 32}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "num_experts": 0, "mlp_only_layers": [],
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
REFUSED = "experts with biases, as gpt-oss has them"
# By the class of its config: name, what differs from SIZES, and how many modules are pruned.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama": ("Llama", DENSE, 14),
    "Mistral": ("Mistral", DENSE, 14),
    "Qwen2": ("Qwen2", DENSE, 14),
    "Qwen3": ("Qwen3", DENSE, 14),
    "Gemma3Text": ("Gemma 3", DENSE | {"sliding_window": 64}, 14),
    "Phi": ("Phi", DENSE, 12),
    "Phi3": ("Phi-3 and Phi-4", DENSE, 8),
    "Glm4": ("GLM-4", DENSE, 12),
    "Mixtral": ("Mixtral", EXPERTS | {"num_local_experts": 4, "sliding_window": None}, 32),
    "Qwen3Moe": ("Qwen3-MoE", EXPERTS | {"num_experts": 4}, 32),
    "Glm4Moe": ("GLM-4.5, with experts", EXPERTS | DENSE | SHARED, 26),
    "GptOss": ("gpt-oss", EXPERTS | {"num_local_experts": 4, "sliding_window": 64}, 0),
    "Qwen3Next": ("Qwen3-Next, linear and full attention", DENSE | HYBRID, 13),
}


def made(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **CASES[name][1]})
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def outcome(name: str, folder: Path) -> int:
    """Prune, save, load back and compare the logits; return how many modules are 2:4."""
    settings = entry(folder / "s.jsonl", calibration={"tokens": 300})
    model = oneshot(
        model=str(made(name, folder / "dense")),
        recipe=recipe(settings),
        output_dir=str(folder / "out"),
    )
    report = inspect_checkpoint(folder / "out")
    assert report.sound
    assert {row.structure for row in report.sparse} == {"2:4"}
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(load_model(folder / "out")(input_ids=ids).logits, expected)
    return len(report.sparse)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_is_pruned_and_loads_back_or_is_refused(name, tmp_path):
    _, _, pruned = CASES[name]
    if pruned:
        assert outcome(name, tmp_path) == pruned
    else:
        with pytest.raises(RacError, match=REFUSED):
            outcome(name, tmp_path)


def table() -> str:
    rows = [
        f"| {name} | {f'yes, {pruned} matrices' if pruned else f'refused: {REFUSED}'} |"
        for name, _, pruned in CASES.values()
    ]
    head = "| architecture | pruned to 2:4, saved, loaded with the same logits |\n|---|---|\n"
    return head + "\n".join(rows) + "\n"


def test_the_page_has_the_table():
    """If this fails: python -m tests.llmcompressor.test_architectures."""
    assert table() == PAGE.read_text().partition(MARKS[0])[2].partition(MARKS[1])[0]


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(before + MARKS[0] + table() + MARKS[1] + rest.partition(MARKS[1])[2])
