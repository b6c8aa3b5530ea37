"""Model cards: of a run, and of a model that others pruned and `rac pack` packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from rac_modifier.checkpoint.card import model_card, packed_card, unpacked_card
from rac_modifier.checkpoint.record import License

RECORD = {
    "base_model": "org/Model-1B",
    "pattern": "2 of every 4 consecutive input weights are zero (0.5 of all)",
    "method": "sparsegpt",
    "calibration": {
        "tokens": 32768,
        "trace_tokens": 30000,
        "prompt_tokens": 2768,
        "generic_tokens": 0,
        "sequences": 12,
    },
    "trace_stores": {
        "traces": {"path": "traces.jsonl", "sha256": "abc123", "selection": {"kept": 7, "of": 9}}
    },
    "modules": [
        {
            "name": f"layers.{i}.q_proj",
            "sparsity": 0.5,
            "relative_error": i / 100,
            "dampening": 0.01,
            "retries": i == 3,
        }
        for i in range(9)
    ],
    "versions": {"torch": "2.13", "llmcompressor": None},
    "seed": 0,
}


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_full_record() -> None:
    card = model_card(RECORD)
    assert front_matter(card)["base_model"] == "org/Model-1B"
    assert front_matter(card)["library_name"] == "transformers"
    for expected in (
        "2 of every 4 consecutive",
        "32,768 tokens in all; 30,000 of the model's own chain of thought; 2,768 of prompts; 0 of generic text; 12 sequences",
        "| Traces | `traces.jsonl`, sha256 `abc123`, 7 of its 9 traces selected |",
        "| Seed | 0 |",
        "9 linear modules were pruned, each to a sparsity of 0.5000 to 0.5000.",
        "raised for 1 of them",
        "| `layers.8.q_proj` | 0.08 |",
        "# org/Model-1B pruned",
        'AutoModelForCausalLM.from_pretrained("path/to/this/folder"',
        "Made with torch 2.13.",
    ):
        assert expected in card
    assert "layers.3.q_proj" not in card  # only the five worst
    assert "not recorded" not in card


@pytest.mark.parametrize("base", ["Model: 1B", "a/b/c", "a model", ""])
def test_a_base_model_that_cannot_be_of_the_hub_is_named_in_the_text_alone(base: object) -> None:
    """The hub refuses a card with such an id."""
    card = model_card({**RECORD, "base_model": base})
    assert "base_model" not in front_matter(card)
    assert f"| Base model | {base} |" in card


def test_the_front_matter() -> None:
    assert front_matter(
        model_card(
            {**RECORD, "quantization": ["int8"]}, License("other", "llama3", "https://x.org")
        )
    ) == {
        "base_model": "org/Model-1B",
        "license": "other",
        "license_name": "llama3",
        "license_link": "https://x.org",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "quantized",
            "pruned",
            "sparse",
            "reasoning",
            "rac",
            "llm-compressor",
            "compressed-tensors",
        ],
    }


def test_nothing_is_invented() -> None:
    card = model_card({})
    assert "base_model" not in front_matter(card)
    assert card.count("not recorded") == 5
    assert "linear modules" not in card
    assert "accuracy" not in card.lower().replace(
        "accuracy, thinking length and speed are **not**", ""
    )


def test_odd_records_do_not_fail() -> None:
    for record in (
        {
            "calibration": {"parts": {"a": 1, "b": 2}},
            "trace_stores": {"x": None},
            "modules": None,
            "versions": None,
        },
        {
            "modules": [{}, {"name": "a"}, {"relative_error": None}],
            "calibration": {"tokens": "many"},
        },
        {"modules": ["x"], "recipe": {"a": [1]}, "pattern": "a | b\nc"},
    ):
        card = model_card(record)
        assert front_matter(card)["tags"]
        assert ("| Pattern | a \\| b c |" in card) == ("pattern" in record)


def test_seed_of_the_modifier_is_found() -> None:
    assert "| Seed | 11 |" in model_card({"modifier": {"seed": 11}})


def test_intervals_where_they_are_recorded() -> None:
    """95 % of a normal distribution: 1.96 standard errors to both sides, within what is possible."""
    errors = {"kl_stderr": 0.001, "agreement_stderr": 0.01}
    measured = {"kl": 0.01, "agreement": 0.99, "tokens": 2100, **errors}
    card = model_card({**RECORD, "divergence": measured})
    assert "On 2,100 tokens" in card
    assert "0.0100 nats per token (KL divergence, 95 % interval 0.0080 to 0.0120)" in card
    assert "99.0% of the tokens (95 % interval 97.0% to 100.0%)" in card
    assert "interval 0.0000 to" in model_card(
        {**RECORD, "divergence": {**measured, "kl_stderr": 1.0}}
    )
    alone = measured | dict.fromkeys(errors)
    assert "interval" not in model_card({**RECORD, "divergence": alone})
    without = {"not_measured": "no traces were held out"}
    assert "nats" not in model_card({**RECORD, "divergence": without})


def test_the_license_of_the_base_model() -> None:
    assert "| License | apache-2.0 |" in model_card(RECORD, License("apache-2.0"))
    assert "| License | unknown: see base model |" in model_card(RECORD)
    assert front_matter(model_card(RECORD))["license"] == "unknown"


def test_how_to_serve() -> None:
    assert "vllm serve path/to/this/folder" in model_card(RECORD)
    assert "its plugin reads the packed weights" in model_card(RECORD)
    assert "`rac unpack` writes an ordinary dense checkpoint" in model_card(RECORD)
    dense = model_card(RECORD, packed=False)
    assert "stock vLLM serves them" in dense
    assert "rac_modifier" not in dense
    assert "rac unpack" not in dense


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
    four = model_card(
        {**RECORD, "quantization": ["int4 in groups of 128 (pack-quantized)"]}, packed=False
    )
    assert "--quantization rac" not in four


PACKED = {
    "base_model": "owner/pruned",
    "packing": {
        "format": "sparse-bitmask",
        "modules": {"2:4": 3, "unstructured": 4},
        "sparsity": 0.512345,
        "dense_bytes": 2000,
        "packed_bytes": 1200,
        "negative_zeros": "kept",
    },
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


def test_without_a_card_before(tmp_path: Path) -> None:
    card = ModelCard(packed_card(PACKED, tmp_path))
    assert isinstance(card.data, ModelCardData)
    assert (card.data.base_model, card.data.license) == ("owner/pruned", "unknown")
    for expected in (
        "# owner/pruned, packed",
        "| License | unknown: see base model |",
        "| Patterns | 3 modules 2:4, 4 modules unstructured |",
        "| Zeros in the packed modules | 51.23% |",
        "| Weights of these modules | 1,200 bytes, 2,000 stored dense |",
        "bit for bit",
        "import rac_modifier",
        "vllm serve",
        "Made with torch 2.13.",
    ):
        assert expected in card.content
    assert "Card of the base model" not in card.content


def test_the_card_before_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(BEFORE)
    card = ModelCard(packed_card(PACKED, tmp_path))
    data = card.data.to_dict()
    assert data["license"] == "mit"
    assert data["language"] == ["en", "de"]
    assert data["base_model"] == "owner/pruned"
    assert data["pipeline_tag"] == "text2text-generation"
    assert data["tags"] == ["wanda", "sparse", "compressed-tensors", "rac"]
    assert card.content.endswith(
        "## Card of the base model\n\n# Their model\n\nText with --- dashes.\n\n---\nMore.\n"
    )


@pytest.mark.parametrize(
    "before", ["---\n{broken: [\n---\n# Theirs\n", "# Theirs\n", "---\n- a list\n---\n# Theirs"]
)
def test_a_card_with_odd_front_matter(tmp_path: Path, before: str) -> None:
    (tmp_path / "README.md").write_text(before)
    card = ModelCard(packed_card(PACKED, tmp_path))
    assert card.data.base_model == "owner/pruned"
    assert card.content.rstrip().endswith("# Theirs")


def test_a_model_that_was_pruned_here_has_the_card_of_its_run(tmp_path: Path) -> None:
    card = packed_card({"base_model": "a/b", "pattern": "2:4", "method": "alps"}, tmp_path)
    assert "# a/b pruned" in card
    assert "| Solver | alps |" in card


@pytest.mark.parametrize("before", [BEFORE, None])
def test_unpacked_it_has_the_card_of_before(tmp_path: Path, before: str | None) -> None:
    if before is not None:
        (tmp_path / "README.md").write_text(before)
    (tmp_path / "README.md").write_text(packed_card(PACKED, tmp_path))
    card = ModelCard(unpacked_card(PACKED, tmp_path))
    assert card.data.base_model == "owner/pruned"
    if before is not None:
        assert card.text.strip() == "# Their model\n\nText with --- dashes.\n\n---\nMore."
        assert (card.data.license, card.data.tags) == ("mit", ["wanda", "sparse"])
    else:
        assert (card.text.strip(), card.data.tags) == ("# owner/pruned", ["sparse"])
    assert "rac_modifier" not in card.content


def test_unpacked_a_model_that_was_pruned_here_has_the_card_of_its_run(tmp_path: Path) -> None:
    card = unpacked_card({"base_model": "a/b", "pattern": "2:4", "method": "alps"}, tmp_path)
    assert "| Solver | alps |" in card
    assert "stock vLLM serves them" in card
