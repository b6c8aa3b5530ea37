"""Mistakes about problems and models."""

import json
from pathlib import Path
from typing import Any

from tests.bad_inputs.bench import Bench, Case, Cases
from tests.tiny import save_tiny

CASES = Cases()

CASES += [
    Case("a model that is not there", "no model at", lambda b: b.rac_prune(model="./no-model")),
    Case(
        "a tokenizer that is not there",
        "name one in the recipe (tokenizer: path or id)",
        lambda b: b.prune_with(tokenizer="./no-such-tokenizer"),
    ),
]


@CASES.case("a folder of GGUF files", "GGUF, which is not read; take the safetensors files")
def _(b: Bench) -> None:
    (b.tmp / "model").mkdir()
    (b.tmp / "model" / "model.gguf").write_bytes(b"GGUF")
    b.rac("pack", b.tmp / "model", "--check")


@CASES.case("an empty folder in the place of a model", "no config.json is in it")
def _(b: Bench) -> None:
    (b.tmp / "model").mkdir()
    b.rac_prune(model=b.tmp / "model")


@CASES.case("pruning a download without weights", "no weights in it; complete the download")
def _(b: Bench) -> None:
    folder = save_tiny(b.tmp / "model")
    (folder / "model.safetensors").unlink()
    b.rac_prune(model=folder)


def of_type(b: Bench, **changes: Any) -> Path:
    """The tiny model with another config.json."""
    config = save_tiny(b.tmp / "model") / "config.json"
    content = json.loads(config.read_text()) | {"model_type": "new", **changes}
    config.write_text(json.dumps(content))
    return config.parent


@CASES.case("a model of an unknown architecture", "must be able to read its config.json")
def _(b: Bench) -> None:
    b.rac_prune(model=of_type(b))


@CASES.case("a model that brings code of its own", "auto_map in config.json), which is not run")
def _(b: Bench) -> None:
    def asked(*args: Any) -> str:
        raise AssertionError("asked whether to run the code")

    b.monkeypatch.setattr("builtins.input", asked)
    b.rac_prune(model=of_type(b, auto_map={"AutoConfig": "configuration_new.NewConfig"}))
