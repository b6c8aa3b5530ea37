"""A small genuine reasoning model that ships with the package, and the problems it solves."""

from importlib import resources
from pathlib import Path

from rac_modifier.errors import RacError


def reasoner_path() -> Path:
    """Return the folder of the embedded reasoner, for `from_pretrained` (RacError: no weights)."""
    folder = Path(str(resources.files(__name__))) / "assets"
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise RacError(
            f"the embedded reasoner is missing from {folder}; train it (about half an hour "
            f"on two cores) with: python training/train_reasoner.py --out {folder}"
        )
    return folder
