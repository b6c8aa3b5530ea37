"""Model cards: of a run, and of a model that others pruned and `rac pack` packed."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from rac_modifier.checkpoint.card import model_card, packed_card, unpacked_card
from rac_modifier.checkpoint.record import split_card
from rac_modifier.errors import RacError

RECORD = {
    "base_model": "org/Model-1B",
    "pattern": "2 of every 4 consecutive input weights are zero (0.5 of all)",
    "method": "sparsegpt",
    "calibration": {"tokens": 32768, "trace_tokens": 30000, "generic_tokens": 0, "sequences": 12},
    "trace_stores": {
        "traces": {"path": "traces.jsonl", "sha256": "abc123", "selection": {"kept": 7, "of": 9}}
    },
    "modules": [
        {"name": f"layers.{i}.q_proj", "sparsity": 0.5, "relative_error": i / 100} for i in range(9)
    ],
    "versions": {"torch": "2.13", "llmcompressor": None},
    "seed": 0,
}
PACKED = {
    "base_model": "owner/pruned",
    "packing": {"negative_zeros": "kept", "modules": {"2:4": 3}},
    "versions": {"torch": "2.13"},
}
BEFORE = """---
license: mit
language: [en, de]
tags: [wanda, sparse]
base_model: someone/else
pipeline_tag: text2text-generation
---
# Their model

Text with --- dashes.

---
More.
"""


def test_full_record() -> None:
    card = model_card(RECORD)
    for expected in (
        "| License | unknown |",
        "2 of every 4 consecutive",
        "32,768 tokens in all; 30,000 of the model's own chain of thought; 0 of generic text; 12",
        "| Traces | `traces.jsonl`, sha256 `abc123`, 7 of its 9 traces selected |",
        "| Seed | 0 |",
        "9 linear modules were pruned, each to a sparsity of 0.5000 to 0.5000.",
        "| `layers.8.q_proj` | 0.08 |",
        "# org/Model-1B pruned",
        "Made with torch 2.13.",
        "`rac unpack` writes an ordinary dense checkpoint",
        "its plugin reads the packed weights",
    ):
        assert expected in card
    assert "layers.3.q_proj" not in card  # only the five worst
    assert "not recorded" not in card
    dense = model_card(RECORD, packed=False)
    assert "stock vLLM serves them" in dense
    assert "rac_modifier" not in dense


def test_the_front_matter_is_what_the_hub_parses() -> None:
    license = {"license": "other", "license_name": "llama3", "license_link": "https://x.org"}
    card = ModelCard(model_card({**RECORD, "quantization": ["int8"]}, license))
    assert isinstance(card.data, ModelCardData)
    actual = {key: value for key, value in card.data.to_dict().items() if value is not None}
    tags = ["quantized", "pruned", "sparse", "reasoning", "rac"]
    assert actual == {
        **license,
        "base_model": "org/Model-1B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*tags, "llm-compressor", "compressed-tensors"],
    }
    assert "| License | llama3 |" in card.text


@pytest.mark.parametrize("base", ["Model: 1B", "a/b/c", "a model"])
def test_a_base_model_that_cannot_be_of_the_hub_is_named_in_the_text_alone(base: str) -> None:
    card = model_card({**RECORD, "base_model": base})
    assert "base_model" not in split_card(card)[0]
    assert f"| Base model | {base} |" in card


def test_nothing_is_invented() -> None:
    card = model_card({})
    assert card.count("not recorded") == 5
    assert "linear modules" not in card


def test_a_malformed_record_is_refused_and_a_cell_is_one_cell() -> None:
    for record in ({"modules": ["x"]}, {"calibration": {"tokens": "many"}}, {"versions": [1]}):
        with pytest.raises(RacError, match=r"^rac_run\.json: is malformed .* restore the file"):
            model_card(record)
    assert "| Pattern | a \\| b c |" in model_card({"pattern": "a | b\nc"})


def test_kl_with_its_interval() -> None:
    """95 % of a normal distribution: 1.96 standard errors to both sides, within what is
    possible."""
    errors = {"kl_stderr": 0.001, "agreement_stderr": 0.01}
    measured = {"kl": 0.01, "agreement": 0.99, "tokens": 2100, **errors}
    card = model_card({**RECORD, "divergence": measured})
    assert "On 2,100 tokens" in card
    assert "0.0100 nats per token (KL divergence, 95 % interval 0.0080 to 0.0120)" in card
    assert "99.0% of the tokens (95 % interval 97.0% to 100.0%)" in card
    alone = measured | dict.fromkeys(errors)
    assert "interval" not in model_card({**RECORD, "divergence": alone})
    without = {"not_measured": "no traces were held out"}
    assert "nats" not in model_card({**RECORD, "divergence": without})


@pytest.mark.parametrize(
    ("scheme", "name"),
    [("int3 in groups of 64", "int3"), ("int2 one scale per channel, asymmetric", "int2")],
)
def test_how_to_serve_few_bits(scheme: str, name: str) -> None:
    record = {**RECORD, "quantization": [f"{scheme} (pack-quantized)"]}
    card = model_card(record, packed=False)
    assert "vllm serve path/to/this/folder --quantization rac\n" in card
    assert f"vLLM, which has no kernel for {name} weights on a CPU." in card
    assert "stock vLLM" not in card


@pytest.mark.parametrize("before", [BEFORE, None])
def test_the_card_before_is_kept_and_comes_back(tmp_path: Path, before: str | None) -> None:
    if before is not None:
        (tmp_path / "README.md").write_text(before)
    packed = packed_card(PACKED, tmp_path)
    for expected in ("# owner/pruned, packed", "bit for bit", "import rac_modifier", "torch 2.13"):
        assert expected in packed
    (tmp_path / "README.md").write_text(packed)
    unpacked = ModelCard(unpacked_card(PACKED, tmp_path))
    assert "rac_modifier" not in unpacked.content
    if before is None:
        assert (unpacked.text.strip(), unpacked.data.tags) == ("# owner/pruned", ["sparse"])
        return
    data = ModelCard(packed).data.to_dict()
    assert (data["license"], data["language"], data["base_model"]) == (
        *("mit", ["en", "de"], "owner/pruned"),
    )
    assert data["pipeline_tag"] == "text2text-generation"
    assert data["tags"] == ["wanda", "sparse", "compressed-tensors", "rac"]
    text = "# Their model\n\nText with --- dashes.\n\n---\nMore."
    assert packed.endswith(f"## Card of the base model\n\n{text}\n")
    assert unpacked.text.strip() == text
    assert (unpacked.data.license, unpacked.data.tags) == ("mit", ["wanda", "sparse"])


@pytest.mark.parametrize(
    "before", ["---\n{broken: [\n---\n# Theirs\n", "# Theirs\n", "---\n- a list\n---\n# Theirs"]
)
def test_a_card_with_odd_front_matter(tmp_path: Path, before: str) -> None:
    (tmp_path / "README.md").write_text(before)
    card = ModelCard(packed_card(PACKED, tmp_path))
    assert card.data.base_model == "owner/pruned"
    assert card.content.rstrip().endswith("# Theirs")


def test_a_model_that_was_pruned_here_has_the_card_of_its_run(tmp_path: Path) -> None:
    record = {"base_model": "a/b", "pattern": "2:4", "method": "alps"}
    for card in (packed_card(record, tmp_path), unpacked_card(record, tmp_path)):
        assert "# a/b pruned" in card
        assert "| Solver | alps |" in card
    assert "stock vLLM serves them" in card
