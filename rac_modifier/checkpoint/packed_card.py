"""The model card of a model that was packed, and not pruned here: what packing did, then the card that it had before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rac_modifier.checkpoint.card import card_data, fact_table, how_to_use, model_card, versions
from rac_modifier.checkpoint.license import CARD_NAME, front_matter, license_of

_TAGS = ("sparse", "compressed-tensors", "rac")
# Entries of the card before that are made anew.
_OURS = ("base_model", "license", "license_name", "license_link", "tags", "model-index", "model_name", "eval_results")

_SAME_BITS = {
    False: "Loaded, its weights are those of the base model, bit for bit.",
    True: "Loaded, its weights are those of the base model, with 0.0 in the place of -0.0.",
}


def packed_card(record: Mapping[str, Any], source: Path) -> str:
    """The card of the packed model. Of a model that was pruned here, it is made from that run's record.

    Args:
        record: the run record; without a run of this package, it has the figures of `packing`.
        source: the folder that was packed, whose own card, if any, is appended.
    """
    license = license_of(source)
    packing = record.get("packing")
    if not isinstance(packing, Mapping):
        return model_card(record, license)
    path = source / CARD_NAME
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    known = front_matter(before)
    tags = [str(tag) for tag in known.get("tags") or ()]
    base = record.get("base_model")
    parts = [
        card_data(
            base,
            license,
            [*tags, *(tag for tag in _TAGS if tag not in tags)],
            **{key: value for key, value in known.items() if key not in _OURS},
        ),
        f"# {base or 'A sparse language model'}, packed",
        "The zeros of its weights are not stored. " + _SAME_BITS[packing.get("negative_zeros") == "dropped"],
        fact_table(
            [
                ("Base model", base),
                ("License", license.describe()),
                ("Patterns", ", ".join(f"{count} modules {name}" for name, count in packing["modules"].items())),
                ("Zeros in the packed modules", f"{packing['sparsity']:.2%}"),
                (
                    "Weights of these modules",
                    f"{packing['packed_bytes']:,} bytes, {packing['dense_bytes']:,} stored dense",
                ),
            ]
        ),
        how_to_use(packed=True),
        versions(record),
        f"## Card of the base model\n\n{_body(before)}" if _body(before) else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _body(card: str) -> str:
    """The text of a card behind its front matter."""
    if card.startswith("---\n") and "\n---" in card[3:]:
        card = card[4:].partition("\n---")[2].lstrip("-")
    return card.strip()
