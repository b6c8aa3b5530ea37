"""The run record: license of the base model, versions, and what was measured later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rac_modifier.checkpoint.card import model_card, packed_card, unpacked_card
from rac_modifier.checkpoint.record import (
    add_measured,
    card_folder,
    environment,
    license_of,
    record_activations,
)
from rac_modifier.errors import RacError

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
    **{"label": "/models/sparse", "sequences": 9, "tokens": 5000, "kl": 0.02, "kl_stderr": 0.001},
    **{"agreement": 0.97, "agreement_stderr": None},
}
CONDITIONS = {"source": "arithmetic", "prompt": "chat template, no system prompt, thinking on"}
ROW = "| this model | 81.2% | 78.9% to 83.4% | 140 | 2.0% |"
LICENSE = {"license": "other", "license_name": "llama3", "license_link": "https://example.org/L"}
OTHER = "\n".join(f"{key}: {value}" for key, value in LICENSE.items())


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", None, {"license": "apache-2.0"}),
        (f"---\n{OTHER}\n---\n# Card\n", '{"license": "mit"}', LICENSE),
        ("# A card without front matter\n", '{"license": "mit"}', {"license": "mit"}),
        ("---\nlicense: [a, b]\n---\n", "{}", {"license": "unknown"}),
        ("---\nlicense: {broken\n---\n", "not JSON", {"license": "unknown"}),
        (None, "[]", {"license": "unknown"}),
    ],
)
def test_the_license_in_the_card_comes_before_that_in_the_config(
    tmp_path: Path, card: str | None, config: str | None, expected: dict[str, str]
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert license_of(tmp_path) == expected
    for name in ("owner/not-cached", "no/such/id", "Model: 1B", ""):
        assert license_of(name) == {"license": "unknown"}


def test_environment_is_json_and_complete() -> None:
    versions = environment()
    assert json.loads(json.dumps(versions)) == versions
    names = {"torch", "transformers", "llmcompressor", "python", "platform", "cpu_count"}
    assert names <= versions.keys()
    assert versions["rac_modifier"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record = {"base_model": "org/dense", "method": "alps", "pattern": "2:4"}
    (tmp_path / "rac_run.json").write_text(json.dumps(record))
    (tmp_path / "README.md").write_text(model_card(record) + "\nA note of the owner.\n")
    return tmp_path


def add_accuracy(folder: Path, **changes: object) -> str:
    add_measured(
        folder,
        "accuracy",
        {**SPARSE, **changes},
        conditions=CONDITIONS,
        reference=DENSE,
        paired="sparse against org|dense: -8.8 points (-11.0 to -6.6)",
    )
    return (folder / "README.md").read_text()


def test_accuracy_with_its_interval_and_conditions(folder: Path) -> None:
    before = (folder / "README.md").read_text()
    card = add_accuracy(folder)
    for line in (
        "## Measured after compression",
        "| org\\|dense | 90.0% | 88.0% to 91.5% | 140 | 0.0% |",
        ROW,
        "1,200 problems (arithmetic, seed 3), one answer to each, at most 2,048 new tokens, "
        "greedy; prompt: chat template, no system prompt, thinking on. Measured with `rac eval`.",
        "sparse against org|dense: -8.8 points (-11.0 to -6.6).",
    ):
        assert line in card.splitlines()
    start, end = card.index("<!-- measured by rac eval -->\n"), card.index("## Load")
    assert card[:start] + card[end:] == before  # nothing else has changed
    record = json.loads((folder / "rac_run.json").read_text())
    actual = record["evaluation"]["accuracy"]
    assert (actual["ci_high"], actual["reference"]["accuracy"]) == (0.834, 0.9)
    assert record["method"] == "alps"
    assert "/models" not in json.dumps(record) + card  # no path of this machine
    assert "correct_answers" not in actual


def test_a_second_run_replaces_its_own_kind_and_keeps_the_other(folder: Path) -> None:
    add_accuracy(folder, accuracy=0.5)
    add_measured(
        folder, "divergence", DIVERGENCE, conditions=CONDITIONS, reference={"label": "org/dense"}
    )
    card = add_accuracy(folder)
    assert card.count("## Measured after compression") == card.count(ROW) == 1
    assert "50.0%" not in card
    assert (
        "On 5,000 tokens that org/dense generated (arithmetic): the predictions differ from those "
        "of the base model by 0.0200 nats per token (KL divergence, 95 % interval 0.0180 to "
        "0.0220), and the most likely token is the same for 97.0% of the tokens. Prompt: chat "
        "template, no system prompt, thinking on. Measured with `rac eval --divergence`."
    ) in card
    assert card.endswith("A note of the owner.\n")


def test_several_answers_and_no_reference(folder: Path) -> None:
    passed = {"1": 0.8, "2": 0.85, "16": 0.955}
    result = {**SPARSE, "samples": 16, "temperature": 0.6, "pass_at": passed}
    conditions = {**CONDITIONS, "protocol": ["As published."]}
    add_measured(folder, "accuracy", result, conditions=conditions)
    card = (folder / "README.md").read_text()
    assert "16 answers to each, at most 2,048 new tokens, temperature 0.6;" in card
    assert "At least one of 16 answers is correct for 95.5% of the problems." in card
    assert "org|dense" not in card
    assert "\nAs published.\n" in card


def test_a_card_that_is_made_anew_from_the_record_has_it_too(folder: Path) -> None:
    """As `rac pack` and `rac unpack` make it: the weights are the same."""
    add_accuracy(folder)
    record = json.loads((folder / "rac_run.json").read_text())
    foreign = {**record, "packing": {"negative_zeros": "kept"}}
    for card in (
        packed_card(record, folder),
        unpacked_card(record, folder),
        packed_card(foreign, folder / "none"),
        unpacked_card(foreign, folder / "none"),
    ):
        assert card.count(ROW) == 1
    (folder / "README.md").unlink()
    assert add_accuracy(folder).startswith("<!-- measured by rac eval -->\n## Measured after")


def test_only_folders_with_a_run_record_have_a_card(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert card_folder(str(folder)) == folder
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(RacError, match="cannot be written to; copy the model, or leave --card out"):
        card_folder(str(folder))
    for other in ("org/model", str(folder / "none")):
        with pytest.raises(
            RacError, match=rf"--card: {other} is not the folder of a model that rac wrote"
        ):
            card_folder(other)


def test_activations_of_a_model_with_and_without_a_run_record(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    before = json.loads((folder / "rac_run.json").read_text())
    entry = {"limit": 0.01, "source": str(folder / "problems.jsonl")}
    record_activations(folder, ["b", "a"], entry)
    config = json.loads((folder / "config.json").read_text())
    assert config["rac_sparsity"]["int8_activations"] == ["a", "b"]
    record = json.loads((folder / "rac_run.json").read_text())
    assert record == {**before, "activations": {"limit": 0.01, "source": "problems.jsonl"}}

    (folder / "rac_run.json").unlink()
    record_activations(folder, [], {"limit": 0.0})
    config = json.loads((folder / "config.json").read_text())
    assert config["rac_sparsity"]["int8_activations"] == []
    # with a record, `rac eval --card` would take it for a model of rac
    assert not (folder / "rac_run.json").exists()
