"""Model cards: of a run, of a model that others pruned, and what was measured later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from rac_modifier.checkpoint.card import (
    add_measured,
    card_folder,
    converted_card,
    license_of,
    model_card,
)
from rac_modifier.errors import RacError

MIT = {"license": "mit"}
LICENSE = {"license": "other", "license_name": "llama3", "license_link": "https://example.org/L"}
OTHER = "\n".join(f"{key}: {value}" for key, value in LICENSE.items())
RECORD = {
    "base_model": "org/Model-1B",
    "pattern": "2 of every 4 consecutive input weights are zero (0.5 of all)",
    "method": "sparsegpt",
    "calibration": {"tokens": 32768, "trace_tokens": 30000, "parts": {}},
    "trace_stores": {"traces": {"path": "traces.jsonl", "sha256": "abc123"}},
    "versions": {"torch": "2.13", "llmcompressor": None},
    "seed": 0,
}
FOREIGN = {"base_model": "owner/pruned", "packing": {"negative_zeros": "kept"}}


def test_full_record() -> None:
    card = model_card(RECORD, MIT)
    for expected in (
        "# org/Model-1B pruned",
        "| License | mit |",
        "| Pattern | 2 of every 4 consecutive",
        "| Calibration | tokens 32,768, trace tokens 30,000 |",
        "| Traces | `traces.jsonl`, sha256 `abc123` |",
        "| Seed | 0 |",
        "| Made with | torch 2.13 |",
        "`rac unpack` writes an ordinary dense checkpoint",
    ):
        assert expected in card
    dense = model_card(RECORD, MIT, packed=False)
    assert "Stock vLLM serves these weights" in dense
    assert "rac_modifier" not in dense
    assert "|  |" not in model_card({}, MIT)


def test_the_front_matter_is_what_the_hub_parses() -> None:
    card = ModelCard(model_card({**RECORD, "quantization": ["int8"]}, LICENSE))
    assert isinstance(card.data, ModelCardData)
    actual = {key: value for key, value in card.data.to_dict().items() if value is not None}
    tags = ["pruned", "quantized", "sparse", "reasoning", "rac"]
    assert actual == {
        **LICENSE,
        "base_model": "org/Model-1B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*tags, "llm-compressor", "compressed-tensors"],
    }
    assert "| License | llama3 |" in card.text
    local = ModelCard(model_card({**RECORD, "base_model": "Model: 1B"}, MIT))
    assert local.data.base_model is None  # the hub refuses it
    assert "| Base model | Model: 1B |" in local.text


def test_a_cell_is_one_cell() -> None:
    assert "| Pattern | a \\| b c |" in model_card({"pattern": "a | b\nc"}, MIT)


def test_kl_with_its_interval() -> None:
    """95 % of a normal distribution: 1.96 standard errors to both sides."""
    measured = {"kl": 0.01, "agreement": 0.99, "tokens": 2100, "kl_stderr": 0.001}
    card = model_card({**RECORD, "divergence": measured}, MIT)
    assert "On 2,100 tokens" in card
    assert "0.0100 nats per token (95 % interval 0.0080 to 0.0120)" in card
    assert "99.0% of the tokens." in card
    alone = {**measured, "kl_stderr": None}
    assert "interval" not in model_card({**RECORD, "divergence": alone}, MIT)
    assert "nats" not in model_card({**RECORD, "divergence": {"not_measured": "no traces"}}, MIT)


@pytest.mark.parametrize("bits", [3, 2])
def test_how_to_serve_few_bits(bits: int) -> None:
    record = {**RECORD, "quantization": [f"int{bits} in groups of 64 (pack-quantized)"]}
    card = model_card(record, MIT, packed=False)
    assert "vllm serve path/to/this/folder\n" in card
    assert f"vLLM, which has no kernel for int{bits} weights on a CPU." in card
    assert "Stock vLLM" not in card


@pytest.mark.parametrize("before", ["---\nlicense: mit\n---\n\n# Theirs\n\nText.\n", None])
def test_the_card_of_others_is_kept_and_comes_back(tmp_path: Path, before: str | None) -> None:
    if before is not None:
        (tmp_path / "README.md").write_text(before)
    before = before or "# owner/pruned\n"
    packed = converted_card(FOREIGN, tmp_path, packed=True)
    assert packed.startswith(before)
    assert "import rac_modifier" in packed
    (tmp_path / "README.md").write_text(packed)
    assert converted_card(FOREIGN, tmp_path, packed=False) == before


def test_a_model_that_was_pruned_here_has_the_card_of_its_run(tmp_path: Path) -> None:
    record = {"base_model": "a/b", "pattern": "2:4", "method": "alps"}
    for packed in (True, False):
        (tmp_path / "README.md").write_text(model_card(record, MIT, packed=not packed))
        assert converted_card(record, tmp_path, packed) == model_card(record, MIT, packed)


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        (f"---\n{OTHER}\n---\n# Card\n", '{"license": "mit"}', LICENSE),
        ("# A card without front matter\n", '{"license": "mit"}', MIT),
        ("---\nlicense: [a, b]\n---\n", "{}", {"license": "unknown"}),
        ("---\nlicense: {broken\n---\n", "not JSON", {"license": "unknown"}),
    ],
)
def test_the_license_in_the_card_comes_before_that_in_the_config(
    tmp_path: Path, card: str, config: str, expected: dict[str, str]
) -> None:
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "config.json").write_text(config)
    assert license_of(tmp_path) == expected
    assert license_of("owner/not-cached") == {"license": "unknown"}


DENSE = {
    **{"label": "/models/org|dense", "problems": 1200, "samples": 1, "accuracy": 0.9},
    **{"ci_low": 0.88, "ci_high": 0.915, "pass_at": {"1": 0.9}, "mean_thinking_tokens": 140.4},
    **{"unfinished_share": 0.0, "cap": 2048, "temperature": 0.0, "seed": 3},
    "correct_answers": {"p1": 1},
}
SPARSE = {
    **DENSE,
    **{"label": "/models/sparse", "accuracy": 0.8125, "ci_low": 0.789, "ci_high": 0.834},
    "unfinished_share": 0.02,
}
DIVERGENCE = {
    **{"label": "/models/sparse", "tokens": 5000, "kl": 0.02, "kl_stderr": 0.001},
    **{"agreement": 0.97, "bins": []},
}
CONDITIONS = {"source": "arithmetic", "prompt": "chat template", "protocol": ["As published."]}
ROW = "| this model | 81.2% | 78.9% to 83.4% | 140 | 2.0% |"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record = {"base_model": "org/dense", "method": "alps", "pattern": "2:4"}
    (tmp_path / "rac_run.json").write_text(json.dumps(record))
    (tmp_path / "README.md").write_text(model_card(record, MIT) + "\nA note of the owner.\n")
    return tmp_path


def add_accuracy(folder: Path, **changes: object) -> str:
    paired = "sparse against org|dense: -8.8 points (-11.0 to -6.6)"
    measured = {"conditions": CONDITIONS, "reference": DENSE, "paired": paired}
    add_measured(folder, "accuracy", {**SPARSE, **changes}, **measured)
    return (folder / "README.md").read_text()


def test_accuracy_with_its_interval_and_conditions(folder: Path) -> None:
    before = (folder / "README.md").read_text()
    card = add_accuracy(folder)
    for line in (
        "## Measured after compression",
        "| org\\|dense | 90.0% | 88.0% to 91.5% | 140 | 0.0% |",
        ROW,
        "1,200 problems (arithmetic, seed 3), 1 answers to each, at most 2,048 new tokens, "
        "greedy; prompt: chat template. Measured with `rac eval`.",
        "As published.",
        "sparse against org|dense: -8.8 points (-11.0 to -6.6).",
    ):
        assert line in card.splitlines()
    assert card.startswith(before)
    record = json.loads((folder / "rac_run.json").read_text())
    actual = record["evaluation"]["accuracy"]
    assert (actual["ci_high"], actual["reference"]["accuracy"]) == (0.834, 0.9)
    assert record["method"] == "alps"
    assert "/models" not in json.dumps(record) + card  # no path of this machine
    assert "correct_answers" not in actual
    assert ROW in converted_card(record, folder, packed=False)  # the weights are the same
    (folder / "README.md").unlink()
    assert add_accuracy(folder).startswith("<!-- measured by rac eval -->\n## Measured after")


def test_a_second_run_replaces_its_own_kind_and_keeps_the_other(folder: Path) -> None:
    add_accuracy(folder, accuracy=0.5)
    reference = {"label": "org/dense"}
    add_measured(folder, "divergence", DIVERGENCE, conditions=CONDITIONS, reference=reference)
    card = add_accuracy(folder)
    assert card.count("## Measured after compression") == card.count(ROW) == 1
    assert "50.0%" not in card
    assert (
        "On 5,000 tokens that org/dense generated (arithmetic): KL divergence from the base model "
        "0.0200 nats per token (95 % interval 0.0180 to 0.0220); the most likely token is the same "
        "for 97.0% of the tokens. Prompt: chat template. Measured with `rac eval`."
    ) in card
    assert "\nA note of the owner.\n" in card


def test_only_folders_with_a_run_record_have_a_card(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert card_folder(str(folder)) == folder
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(RacError, match="cannot be written to; copy the model, or leave --card out"):
        card_folder(str(folder))
    with pytest.raises(RacError, match=r"--card: org/model is not the folder of a model that rac"):
        card_folder("org/model")
