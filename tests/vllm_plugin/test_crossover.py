"""The number of rows that the kernels multiply themselves: measured once, set, the same on all ranks."""

from __future__ import annotations

import math
import pickle
from types import SimpleNamespace

import pytest

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank

needs_vllm()

from rac_modifier.checkpoint.formats import FORMAT_BITMASK  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.cpu import operator  # noqa: E402
from rac_modifier.kernels.cpu.crossover import Crossover  # noqa: E402
from rac_modifier.kernels.cpu.support import Support  # noqa: E402
from rac_modifier.vllm_plugin import activations, crossover, quant_config  # noqa: E402
from rac_modifier.vllm_plugin.crossover import crossovers, wanted_rows  # noqa: E402
from tests.vllm_plugin.layer_kinds import make, quantized_config  # noqa: E402

ALL = ["floats", "int8", "int4", "int8 with 8-bit activations", "int4 with 8-bit activations"]


@pytest.fixture(autouse=True)
def _measured(monkeypatch):
    """A processor with AVX2 where 256 rows were measured, and nothing in the environment."""
    for variable in ("RAC_CROSSOVER", "VLLM_BATCH_INVARIANT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(crossover, "support", lambda: Support("avx2", "a test's"))
    monkeypatch.setattr(
        crossover, "measure_crossovers", lambda kinds: [Crossover(kind, 256, {}) for kind in kinds]
    )
    monkeypatch.setattr(quant_config, "check_index", lambda folder: None)
    yield
    operator.forget_crossovers()


def test_measured_and_logged(monkeypatch):
    logged = []
    monkeypatch.setattr(
        crossover.logger, "info", lambda text, *values: logged.append(text % values)
    )
    assert crossovers(["int8"]) == {"int8": 256}
    assert logged[0].startswith(
        "rac: measured on a core of this machine\n  int8: the kernel multiplies up to 256"
    )


def test_set_or_invariant_and_then_not_measured(monkeypatch):
    monkeypatch.setattr(crossover, "measure_crossovers", None)
    for value, rows in (("512", 512), ("inf", math.inf), ("8", 8)):
        monkeypatch.setenv("RAC_CROSSOVER", value)
        assert crossovers(["int8"]) == dict.fromkeys(
            ALL, rows
        )  # also for its head, and for a draft
    for value in ("-1", "1.5", "nan", "many"):
        monkeypatch.setenv("RAC_CROSSOVER", value)
        with pytest.raises(RacError, match=f'RAC_CROSSOVER="{value}": give a number of rows'):
            wanted_rows()
    for value in ("0", "1", "7", "007"):  # would act as 8
        monkeypatch.setenv("RAC_CROSSOVER", value)
        with pytest.raises(
            RacError,
            match=f'RAC_CROSSOVER="{value}": the kernels always multiply up to 8 rows themselves; give 8 or more',
        ):
            crossovers(["int8"])
    monkeypatch.delenv("RAC_CROSSOVER")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert crossovers(["int8"]) == dict.fromkeys(ALL, math.inf)


def test_layers_with_8_bits_are_measured_as_they_run(monkeypatch):
    """AVX2 multiplies no bytes, so such a layer runs there with 16 bits."""
    assert crossovers(["floats", "int8"], eight_bits=True) == {"floats": 256, "int8": 256}
    for isa in ("avxvnni", "avx512", "amx", "dotprod", "i8mm", "sve"):
        monkeypatch.setattr(crossover, "support", lambda isa=isa: Support(isa, "a test's"))
        assert crossovers(["floats", "int8"]) == {"floats": 256, "int8": 256}
        found = crossovers(["floats", "int8", "int4"], eight_bits=True)
        assert found == dict.fromkeys(ALL, 256)


@pytest.mark.parametrize(
    ("recorded", "asked"), [(False, None), (True, None), (True, "int16"), (False, "int8")]
)
def test_a_model_says_whether_it_has_such_layers(recorded, asked, monkeypatch):
    monkeypatch.setattr(crossover, "support", lambda: Support("avx512", "a test's"))
    monkeypatch.setattr(activations, "support", lambda: Support("avx512", "a test's"))
    monkeypatch.delenv("RAC_ACTIVATIONS", raising=False)
    if asked:
        monkeypatch.setenv("RAC_ACTIVATIONS", asked)
    config = quantized_config(FORMAT_BITMASK, "int8")
    record = {"modules": {"a.up": "50 %"}, "int8_activations": ["a.up"]} if recorded else None
    config.maybe_update_config("model", SimpleNamespace(rac_sparsity=record))
    eight = asked == "int8" or (recorded and asked is None)
    assert config.crossovers == {
        "int8": 256,
        **({"int8 with 8-bit activations": 256} if eight else {}),
    }


def test_where_no_kernel_runs(monkeypatch):
    monkeypatch.setattr(crossover, "measure_crossovers", None)
    monkeypatch.setattr(crossover, "support", lambda: Support("portable", "a test's"))
    assert crossovers(["int8"]) == {}
    monkeypatch.setattr(crossover, "support", lambda: Support(None, "no compiled kernel: why"))
    assert crossovers(["int8"]) == {}
    monkeypatch.setenv("RAC_CROSSOVER", "64")
    with pytest.raises(
        RacError,
        match=r"RAC_CROSSOVER: no layer runs on a CPU kernel here \(no compiled kernel: why\)",
    ):
        crossovers(["int8"])


@pytest.mark.parametrize(
    ("scheme", "kind"), [("int8", "int8"), ("int4", "int4"), ("fp8", "floats")]
)
def test_every_process_uses_what_one_has_measured(scheme, kind, monkeypatch):
    """vLLM makes the config in one process and sends it to the others."""
    config = quantized_config(FORMAT_BITMASK, scheme)
    config.maybe_update_config("model")
    sent = pickle.loads(pickle.dumps(config))
    monkeypatch.setattr(crossover, "measure_crossovers", None)
    on_rank(monkeypatch, 1, 2)
    make("column", sent)
    assert operator._chosen == {kind: 256}


def test_a_draft_of_another_kind_leaves_the_numbers_of_its_target(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    target, draft = (
        quantized_config(FORMAT_BITMASK, "int8"),
        quantized_config(FORMAT_BITMASK, "int4"),
    )
    for rows, config in ((256, target), (64, draft)):
        monkeypatch.setattr(
            crossover,
            "measure_crossovers",
            lambda kinds, rows=rows: [Crossover(kind, rows, {}) for kind in kinds],
        )
        config.maybe_update_config("model")
        make("column", config)
    assert operator._chosen == {"int8": 256, "int4": 64}
