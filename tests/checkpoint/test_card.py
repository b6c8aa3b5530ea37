from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from rac_modifier.checkpoint.card import model_card
from rac_modifier.checkpoint.license import License

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
        assert front_matter(model_card(record))["tags"]


def test_cells_cannot_break_the_table() -> None:
    assert "| Pattern | a \\| b c |" in model_card({"pattern": "a | b\nc"})


def test_seed_of_the_modifier_is_found() -> None:
    assert "| Seed | 11 |" in model_card({"modifier": {"seed": 11}})


def test_divergence_is_stated_where_it_was_measured() -> None:
    measured = {**RECORD, "divergence": {"kl": 0.01234, "agreement": 0.987, "tokens": 2100}}
    assert "On 2,100 tokens" in model_card(measured)
    assert "0.0123 nats per token" in model_card(measured)
    assert "98.7% of the tokens" in model_card(measured)
    assert "nats" not in model_card(
        {**RECORD, "divergence": {"not_measured": "no traces were held out"}}
    )


def test_intervals_where_they_are_recorded() -> None:
    """95 % of a normal distribution: 1.96 standard errors to both sides, within what is possible."""
    found = {
        "kl": 0.01,
        "kl_stderr": 0.001,
        "agreement": 0.99,
        "agreement_stderr": 0.01,
        "tokens": 10,
    }
    card = model_card({**RECORD, "divergence": found})
    assert "0.0100 nats per token (KL divergence, 95 % interval 0.0080 to 0.0120)" in card
    assert "99.0% of the tokens (95 % interval 97.0% to 100.0%)" in card
    assert "interval 0.0000 to" in model_card({**RECORD, "divergence": {**found, "kl_stderr": 1.0}})
    alone = {**found, "kl_stderr": None, "agreement_stderr": None}
    assert "interval" not in model_card({**RECORD, "divergence": alone})


def test_the_license_of_the_base_model() -> None:
    assert "| License | apache-2.0 |" in model_card(RECORD, License("apache-2.0"))
    assert "| License | unknown: see base model |" in model_card(RECORD)
    assert front_matter(model_card(RECORD))["license"] == "unknown"


def test_how_to_serve() -> None:
    assert "vllm serve path/to/this/folder" in model_card(RECORD)
    assert "its plugin reads the packed weights" in model_card(RECORD)
    dense = model_card(RECORD, packed=False)
    assert "stock vLLM serves them" in dense
    assert "import rac_modifier" not in dense


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


def test_huggingface_hub_reads_the_front_matter() -> None:
    data = ModelCard(model_card(RECORD, License("mit"))).data
    assert isinstance(data, ModelCardData)
    assert (data.base_model, data.license, data.library_name) == (
        "org/Model-1B",
        "mit",
        "transformers",
    )


def test_the_card_of_packed_weights_says_how_to_leave_them() -> None:
    packed, dense = model_card(RECORD, packed=True), model_card(RECORD, packed=False)
    assert "`rac unpack` writes an ordinary dense checkpoint" in packed
    assert "import rac_modifier" in packed
    assert "rac unpack" not in dense
