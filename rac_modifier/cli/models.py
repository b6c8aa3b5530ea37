"""Finding and loading what a command names, and finding out early that it cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rac_modifier.cli.options import Dtype
from rac_modifier.errors import RacError


def resolve(model: str) -> str:
    """What `from_pretrained` takes: the embedded reasoner has a name of its own here."""
    from rac_modifier.reasoner import reasoner_path

    return str(reasoner_path()) if model == "reasoner" else model


def check_model(source: str) -> None:
    """Find out before hours of work whether there is such a model."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise RacError(
            f'no model at {source!r} ({_first_line(error)}); give a model folder, a Hugging Face id, or "reasoner"'
        ) from error


def load_tokenizer(source: str, next_step: str) -> Any:
    """The tokenizer of a model; without one, a RacError that ends in `next_step`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise RacError(f"no tokenizer could be loaded from {source!r} ({_first_line(error)}); {next_step}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def load(model: str, precision: Dtype) -> tuple[Any, Any]:
    """A model, packed or not, with its tokenizer."""
    from rac_modifier.checkpoint.load import load_model

    source = resolve(model)
    check_model(source)
    tokenizer = load_tokenizer(source, "save the model's tokenizer beside it")
    return load_model(source, dtype=precision.value), tokenizer


def unpacked(source: str, precision: Dtype) -> Any:
    """What oneshot takes: the source itself, or where its weights are packed, which oneshot cannot load, the loaded model."""
    from rac_modifier.checkpoint.load import load_model
    from rac_modifier.checkpoint.sparsity_config import CONFIG_FILE, packed_format
    from rac_modifier.files import read_json

    if not (Path(source) / CONFIG_FILE).is_file() or packed_format(read_json(Path(source) / CONFIG_FILE)) is None:
        return source
    return load_model(source, dtype=precision.value)


def subject_of(model: str) -> tuple[Any, Any]:
    """What collecting needs to know of a model that servers sample; its weights stay on disk."""
    from rac_modifier.sampling.subject import Subject

    source = resolve(model)
    check_model(source)
    tokenizer = load_tokenizer(source, "save the model's tokenizer beside it")
    return Subject.of_files(source), tokenizer


def check_output(output: Path, source: str) -> None:
    """Find out before hours of work that the result could not be written."""
    if output.exists() and not output.is_dir():
        raise RacError(f"output {output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()):
        raise RacError(f"output folder {output} is in use; name an empty or a new one")
    if Path(source).is_dir():
        need = sum(f.stat().st_size for f in Path(source).glob("*.safetensors")) * 2
        parent = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
        free = shutil.disk_usage(parent).free
        if free < need:
            raise RacError(
                f"{output}: {free / 2**30:.1f} GiB are free, the checkpoint needs up to {need / 2**30:.1f} GiB while it is "
                "packed; free some or name a folder on another disk"
            )
