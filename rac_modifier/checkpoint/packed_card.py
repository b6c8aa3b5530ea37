"""Cards of a model that was packed, and not pruned here: what packing did, then the card that it had before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rac_modifier.checkpoint.card import card_data, fact_table, how_to_use, model_card, versions
from rac_modifier.checkpoint.license import CARD_NAME, License, front_matter, license_of
from rac_modifier.checkpoint.measured import with_measured

_TAGS = ("sparse", "compressed-tensors", "rac")
_BEFORE = "## Card of the base model"
# Entries of the card before that are made anew.
_OURS = (
    "base_model",
    "license",
    "license_name",
    "license_link",
    "tags",
    "model-index",
    "model_name",
    "eval_results",
)

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
    before = _card_of(source)
    base = record.get("base_model")
    parts = [
        _metadata(before, base, license, _TAGS),
        f"# {base or 'A sparse language model'}, packed",
        "The zeros of its weights are not stored. "
        + _SAME_BITS[packing.get("negative_zeros") == "dropped"],
        fact_table(
            [
                ("Base model", base),
                ("License", license.describe()),
                (
                    "Patterns",
                    ", ".join(
                        f"{count} modules {name}" for name, count in packing["modules"].items()
                    ),
                ),
                ("Zeros in the packed modules", f"{packing['sparsity']:.2%}"),
                (
                    "Weights of these modules",
                    f"{packing['packed_bytes']:,} bytes, {packing['dense_bytes']:,} stored dense",
                ),
            ]
        ),
        how_to_use(packed=True),
        versions(record),
        f"{_BEFORE}\n\n{_body(before)}" if _body(before) else "",
    ]
    return with_measured("\n\n".join(part for part in parts if part) + "\n", record)


def unpacked_card(record: Mapping[str, Any], source: Path) -> str:
    """The card of a packed model that was unpacked: that of its run, or the one that it had before it was packed."""
    license = license_of(source)
    if not isinstance(record.get("packing"), Mapping):
        return model_card(record, license, packed=False)
    packed, base = _card_of(source), record.get("base_model")
    body = packed.partition(f"\n{_BEFORE}\n")[2].strip() or f"# {base or 'A sparse language model'}"
    return with_measured(f"{_metadata(packed, base, license, ('sparse',))}\n\n{body}\n", record)


def _metadata(card: str, base: Any, license: License, added: Sequence[str]) -> str:
    """The front matter of a card with our entries; the tags `_TAGS` are replaced by `added`."""
    known = front_matter(card)
    tags = [str(tag) for tag in known.get("tags") or () if tag not in _TAGS or tag in added]
    others = {key: value for key, value in known.items() if key not in _OURS}
    return card_data(base, license, [*tags, *(tag for tag in added if tag not in tags)], **others)


def _card_of(folder: Path) -> str:
    path = folder / CARD_NAME
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _body(card: str) -> str:
    """The text of a card behind its front matter."""
    if card.startswith("---\n") and "\n---" in card[3:]:
        card = card[4:].partition("\n---")[2].lstrip("-")
    return card.strip()
