"""The number of rows that the kernels multiply themselves: measured once, set, the same on all ranks."""

from __future__ import annotations

import math
import pickle

import pytest

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank

needs_vllm()

from rac_modifier.checkpoint.formats import FORMAT_BITMASK  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.cpu import operator  # noqa: E402
from rac_modifier.kernels.cpu.crossover import Crossover  # noqa: E402
from rac_modifier.kernels.cpu.support import Support  # noqa: E402
from rac_modifier.vllm_plugin import crossover, quant_config  # noqa: E402
from rac_modifier.vllm_plugin.crossover import crossovers, wanted_rows  # noqa: E402
from tests.vllm_plugin.layer_kinds import make, quantized_config  # noqa: E402


@pytest.fixture(autouse=True)
def _measured(monkeypatch):
    """A processor with AVX2 where 256 rows were measured, and nothing in the environment."""
    for variable in ("RAC_CROSSOVER", "VLLM_BATCH_INVARIANT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(crossover, "support", lambda: Support("avx2", "a test's"))
    monkeypatch.setattr(crossover, "measure_crossovers", lambda kinds: [Crossover(kind, 256, {}) for kind in kinds])
    monkeypatch.setattr(quant_config, "check_index", lambda folder: None)
    yield
    operator.use_crossovers({})


def test_measured_and_logged(monkeypatch):
    logged = []
    monkeypatch.setattr(crossover.logger, "info", lambda text, *values: logged.append(text % values))
    assert crossovers(["int8"]) == {"int8": 256}
    assert logged[0].startswith(
        "rac-sparse: measured on a core of this machine\n  int8: the kernel multiplies up to 256"
    )


def test_set_or_invariant_and_then_not_measured(monkeypatch):
    monkeypatch.setattr(crossover, "measure_crossovers", None)
    for value, rows in (("512", 512), ("inf", math.inf), ("0", 0)):
        monkeypatch.setenv("RAC_CROSSOVER", value)
        assert crossovers(["int8", "int4"]) == {"int8": rows, "int4": rows}
    for value in ("-1", "1.5", "nan", "many"):
        monkeypatch.setenv("RAC_CROSSOVER", value)
        with pytest.raises(RacError, match=f'RAC_CROSSOVER="{value}": give a number of rows'):
            wanted_rows()
    monkeypatch.delenv("RAC_CROSSOVER")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert crossovers(["int8"]) == {"int8": math.inf}


def test_where_no_kernel_runs(monkeypatch):
    monkeypatch.setattr(crossover, "measure_crossovers", None)
    monkeypatch.setattr(crossover, "support", lambda: Support("portable", "a test's"))
    assert crossovers(["int8"]) == {}
    monkeypatch.setattr(crossover, "support", lambda: Support(None, "no compiled kernel: why"))
    assert crossovers(["int8"]) == {}
    monkeypatch.setenv("RAC_CROSSOVER", "64")
    with pytest.raises(
        RacError, match=r"RAC_CROSSOVER: no layer runs on a CPU kernel here \(no compiled kernel: why\)"
    ):
        crossovers(["int8"])


@pytest.mark.parametrize(("scheme", "kind"), [("int8", "int8"), ("int4", "int4"), ("fp8", "floats")])
def test_every_process_uses_what_one_has_measured(scheme, kind, monkeypatch):
    """vLLM makes the config in one process and sends it to the others."""
    config = quantized_config(FORMAT_BITMASK, scheme)
    config.maybe_update_config("model")
    sent = pickle.loads(pickle.dumps(config))
    monkeypatch.setattr(crossover, "measure_crossovers", None)
    on_rank(monkeypatch, 1, 2)
    make("column", sent)
    assert operator._chosen == {kind: 256}
