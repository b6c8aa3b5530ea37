"""Shared fixtures: a tiny model on disk and a store of its own traces, both made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import entry, save_tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices: a second thread costs more than it gains, and stalls on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is compared with a float32 reference, on every machine; tests/pruning/test_linalg.py has those in bfloat16."""
    from rac_modifier.pruning import linalg

    monkeypatch.setattr(linalg, "bf16_is_fast", lambda device: False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 (untied head, float32) with its tokenizer; not to be written to."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def trace_store(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the tiny model's traces, filled as far as the tests' recipes need; not to be written to."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rac_modifier.settings.traces import TraceSettings
    from rac_modifier.traces.collect import collect_traces

    path = tmp_path_factory.mktemp("store") / "traces.jsonl"
    settings = TraceSettings(**entry()["traces"])
    collect_traces(
        AutoModelForCausalLM.from_pretrained(tiny_folder),
        AutoTokenizer.from_pretrained(tiny_folder),
        path,
        problems=settings.problems,
        sampling=settings.sampling,
        tokens=4000,
        progress=False,
    )
    return path
