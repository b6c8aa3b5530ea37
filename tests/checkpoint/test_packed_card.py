"""The card of a model that others pruned and `rac pack` packed."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from rac_modifier.checkpoint.packed_card import packed_card, unpacked_card

RECORD = {
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
    card = ModelCard(packed_card(RECORD, tmp_path))
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
    card = ModelCard(packed_card(RECORD, tmp_path))
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
    card = ModelCard(packed_card(RECORD, tmp_path))
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
    (tmp_path / "README.md").write_text(packed_card(RECORD, tmp_path))
    card = ModelCard(unpacked_card(RECORD, tmp_path))
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
