"""Model cards: of a run, of a model that others pruned, and what was measured later."""

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
}
FOREIGN = {"base_model": "owner/pruned", "packing": {"negative_zeros": "kept"}}


def test_full_record():
    card = model_card(RECORD, MIT)
    for expected in (
        "# org/Model-1B pruned",
        "| Pattern | 2 of every 4 consecutive",
        "| Calibration | tokens 32,768, trace tokens 30,000 |",
        "`rac unpack` writes an ordinary dense checkpoint",
    ):
        assert expected in card
    dense = model_card(RECORD, MIT, packed=False)
    assert "Stock vLLM serves these weights" in dense
    assert "import rac_modifier" not in dense
    assert "|  |" not in model_card({}, MIT)
    assert "| Pattern | a \\| b c |" in model_card({"pattern": "a | b\nc"}, MIT)


def test_the_front_matter_is_what_the_hub_parses():
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
    local = ModelCard(model_card({**RECORD, "base_model": "Model: 1B"}, MIT))
    assert local.data.base_model is None  # the hub refuses it
    assert "| Base model | Model: 1B |" in local.text


def test_a_local_folder_is_no_base_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = {**RECORD, "base_model": "checkpoints/step-100"}
    assert "\nbase_model: checkpoints/step-100\n" in model_card(record, MIT)
    (tmp_path / "checkpoints" / "step-100").mkdir(parents=True)
    card = model_card(record, MIT)
    assert "base_model:" not in card
    assert "| Base model | checkpoints/step-100 |" in card
    shortened = model_card({**RECORD, "base_model": "step-100"}, MIT)  # of an absolute path
    assert "base_model:" not in shortened


def test_kl_with_its_interval():
    """95 % of a normal distribution: 1.96 standard errors to both sides."""
    measured = {"kl": 0.01, "agreement": 0.99, "tokens": 2100, "kl_stderr": 0.001}
    card = model_card({**RECORD, "divergence": measured}, MIT)
    assert "On 2,100 tokens" in card
    assert "0.010 nats per token (95 % interval 0.008 to 0.012)" in card
    assert "99.0% of the tokens." in card
    alone = {**measured, "kl_stderr": None, "sequences": 13}
    card = model_card({**RECORD, "divergence": alone}, MIT)
    assert "0.010 nats per token (13 sequences are too few for an interval);" in card
    assert "nats" not in model_card({**RECORD, "divergence": {"not_measured": "no traces"}}, MIT)


@pytest.mark.parametrize("before", ["---\nlicense: mit\n---\n\n# Theirs\n\nText.\n", None])
def test_the_card_of_others_is_kept_and_comes_back(tmp_path, before):
    if before is not None:
        (tmp_path / "README.md").write_text(before)
    before = before or "# owner/pruned\n"
    packed = converted_card(FOREIGN, tmp_path, packed=True)
    assert packed.startswith(before)
    assert "import rac_modifier" in packed
    (tmp_path / "README.md").write_text(packed)
    assert converted_card(FOREIGN, tmp_path, packed=False) == before


def test_a_model_that_was_pruned_here_has_the_card_of_its_run(tmp_path):
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
def test_the_license_in_the_card_comes_before_that_in_the_config(tmp_path, card, config, expected):
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "config.json").write_text(config)
    assert license_of(tmp_path) == expected
    assert license_of("owner/not-cached") == {"license": "unknown"}


@pytest.fixture
def folder(tmp_path) -> Path:
    record = {"base_model": "org/dense", "method": "alps", "pattern": "2:4"}
    (tmp_path / "rac_run.json").write_text(json.dumps(record))
    (tmp_path / "README.md").write_text(model_card(record, MIT) + "\nA note of the owner.\n")
    return tmp_path


def test_a_second_run_replaces_its_own_kind_and_keeps_the_other(folder):
    before = (folder / "README.md").read_text()
    model = {"label": "/models/org/own", "kl": 0.02, "correct_answers": {"p1": 1}}
    for content in ({"results": [model]}, {"divergence": [model]}, {"results": [model]}):
        add_measured(folder, [f"| {model['label']} |", "a line"], content)
    card, record = (folder / name for name in ("README.md", "rac_run.json"))
    card, record = card.read_text(), json.loads(record.read_text())
    assert card.startswith(before)
    assert card.count("```text\n| own |\na line\n```") == 2
    figures = [{"label": "own", "kl": 0.02}]
    assert record["evaluation"] == {"accuracy": figures, "divergence": figures}
    assert record["method"] == "alps"
    assert "a line" in converted_card(record, folder, packed=False)  # the weights are the same


def test_text_behind_a_part_that_lost_its_end_is_kept(folder):
    card, model = folder / "README.md", {"label": "own", "kl": 0.02}
    for _ in range(2):
        for content in ({"results": [model]}, {"divergence": [model]}):
            add_measured(folder, ["a line"], content)
        text = card.read_text()
        assert "A note of the owner." in text
        assert text.count("<!-- divergence by rac eval -->") == 1
        card.write_text(text.replace("<!-- end of accuracy by rac eval -->\n", ""))
    card.write_text(card.read_text().replace("<!-- end of how to use these weights -->\n", ""))
    for packed in (True, False):
        text = converted_card({"base_model": "org/dense"}, folder, packed)
        assert "A note of the owner." in text
        assert text.count("<!-- divergence by rac eval -->") == 1


def test_only_folders_with_a_run_record_have_a_card(folder, monkeypatch):
    assert card_folder(str(folder)) == folder
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(RacError, match="is not writable; copy the model, or leave --card out"):
        card_folder(str(folder))
    with pytest.raises(RacError, match=r"--card: org/model is not the folder of a model that rac"):
        card_folder("org/model")
