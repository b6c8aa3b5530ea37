"""Shared fixtures: a tiny model on disk and a store of its own traces, both made once."""

import gc
import importlib.util
import os
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub would wait for a network

TESTS = Path(__file__).parent
# What runs in the serving environment, which has vLLM and no llm-compressor: folders and
# files, relative to tests/.
SERVING_TESTS = (
    "vllm_plugin",
    "kernels/test_plan.py",
    "formats/test_words.py",
    "formats/test_stored_weight.py",
    "formats/test_fuzz_stored_weight.py",
)


class TorchRandom:
    """Torch's global generator, as `hypothesis.register_random` wants it."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(TORCH_RANDOM)

# No deadline: on a busy machine an example may take any time.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without llm-compressor, collect what runs there, and what is named on the command line."""
    if importlib.util.find_spec("llmcompressor") is not None or collection_path.is_dir():
        return None
    named = [TESTS / name for name in SERVING_TESTS]
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        folder = config.invocation_params.dir
        named += [Path(folder, arg.split("::")[0]).resolve() for arg in config.args]
        named = [path for path in named if path != TESTS]
    if any(collection_path.is_relative_to(path) for path in named):
        return None
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: no process is left with a long test at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Leave imported objects out of garbage collections; AutoRound calls 13 of these per run."""
    gc.collect()
    gc.freeze()


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """Seed the global generators from a name, and put their states back at the end."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed = zlib.crc32(name.encode())  # the same in each process, unlike hash()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


@pytest.fixture(autouse=True)
def seeded_by_name(request) -> Iterator[None]:
    """Each test draws the same numbers, whatever ran before it."""
    with seeded(request.node.name):
        yield


SHARED_STORES: dict[Path, bytes] = {}


@pytest.fixture(autouse=True)
def shared_stores_stay() -> Iterator[None]:
    """What a test appends to a shared store is taken back: no test depends on their order."""
    yield
    for path, content in SHARED_STORES.items():
        if path.read_bytes() != content:
            path.write_bytes(content)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Iterator[None]:
    """A fixture that several tests share draws the same numbers, whichever test needs it first."""
    if fixturedef.scope == "function":
        return (yield)
    with seeded(f"{fixturedef.argname}[{getattr(request, 'param_index', 0)}]"):
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread, unless OMP_NUM_THREADS asks for more."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@pytest.fixture
def float32_products(monkeypatch) -> None:
    """For what is compared with a float32 reference, on every machine."""
    from rac_modifier.pruning import linalg

    monkeypatch.setattr(linalg, "bf16_is_fast", lambda device: False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny random Qwen3 (untied head, float32) with its tokenizer; not to be written to."""
    from tests.tiny import save_tiny  # the process that hands out the tests needs no transformers

    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def trace_store(tiny_folder, tmp_path_factory) -> Path:
    """A store of the tiny model's traces, filled as far as most of the tests' recipes need."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rac_modifier.settings.calibration import TraceSettings
    from rac_modifier.traces.collect import collect_traces
    from tests.tiny import entry

    path = tmp_path_factory.mktemp("store") / "traces.jsonl"
    settings = TraceSettings(**entry()["traces"])
    collect_traces(
        AutoModelForCausalLM.from_pretrained(tiny_folder),
        AutoTokenizer.from_pretrained(tiny_folder),
        settings.model_copy(update={"store": str(path)}),
        4000,
    )
    SHARED_STORES[path] = path.read_bytes()
    return path
