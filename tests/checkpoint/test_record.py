"""The license of a base model, from its card or its config.json, and the versions of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rac_modifier.checkpoint.record import License, environment, front_matter, license_of


def model(folder: Path, card: str | None = None, config: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if card is not None:
        (folder / "README.md").write_text(card)
    if config is not None:
        (folder / "config.json").write_text(config)
    return folder


OTHER = "---\nlicense: other\nlicense_name: llama3\nlicense_link: https://example.org/LICENSE\n---\n# Card\n"


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", None, License("apache-2.0")),
        (
            OTHER,
            json.dumps({"license": "mit"}),
            License("other", "llama3", "https://example.org/LICENSE"),
        ),
        ("# A card without front matter\n", json.dumps({"license": "mit"}), License("mit")),
        ("---\nlicense: [a, b]\n---\n", "{}", License()),
        ("---\nlicense: {broken\n---\n", "not JSON", License()),
        (None, "[]", License()),
        (None, None, License()),
    ],
)
def test_card_before_config(
    tmp_path: Path, card: str | None, config: str | None, expected: License
) -> None:
    assert license_of(model(tmp_path / "m", card, config)) == expected


def test_in_words() -> None:
    assert License("apache-2.0").describe() == "apache-2.0"
    assert License("other", "llama3", "https://x.org").describe() == "llama3 (other), https://x.org"
    assert License().describe() == "unknown: see base model"


def test_a_hub_id_is_looked_up_in_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--owner--name"
    model(folder / "snapshots" / "abc", OTHER)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert license_of("owner/name").name == "llama3"
    for name in ("owner/other", "no/such/id", "Model: 1B", ""):
        assert license_of(name) == License()


def test_front_matter_that_cannot_be_read_is_empty() -> None:
    assert front_matter("---\ntags: [a]\n---\n") == {"tags": ["a"]}
    for text in ("", "# title", "---\n{a: [}\n---\n", "---\n- a\n---\n"):
        assert front_matter(text) == {}


def test_environment_is_json_and_complete() -> None:
    versions = environment()
    assert json.loads(json.dumps(versions)) == versions
    names = {"torch", "transformers", "llmcompressor", "python", "platform", "cpu_count"}
    assert names <= versions.keys()
    assert versions["rac_modifier"]
