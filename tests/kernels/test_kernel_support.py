"""What is said about this machine, and that the operator is a good citizen of torch."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from rac_modifier import kernels
from rac_modifier.errors import RacError
from rac_modifier.kernels import Support, choose, pack, sparse_linear, support
from rac_modifier.kernels.cpu import library as native
from rac_modifier.kernels.cpu import linear
from tests.kernels.kernel_helpers import assert_product, random_mask, sparse, take


def test_importing_is_light_and_loads_no_library():
    code = (
        "import sys, rac_modifier.kernels\n"
        "from rac_modifier.kernels import native\n"
        "heavy = {'vllm', 'llmcompressor', 'compressed_tensors', 'transformers'} & set(sys.modules)\n"
        "print(heavy, native._load.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[-2] == "set() 0", done.stderr


def test_support_names_the_kernel_and_the_compiler(best):
    assert support().isa in native.ISAS
    assert "kernel, compiled with GCC" in support().reason
    assert "OpenMP" in support().reason


def test_a_lower_kernel_can_be_asked_for(native_path, monkeypatch):
    take(native_path, "portable", monkeypatch)
    assert support() == Support("portable", support().reason)
    assert "RAC_KERNEL" in support().reason


def test_what_the_environment_cannot_have_is_an_error(native_path, monkeypatch):
    take(native_path, "avx1024", monkeypatch)
    with pytest.raises(RacError, match='RAC_KERNEL="avx1024": use one of portable, avx2, avx512, amx, off'):
        support()
    best = native.Library(native_path).best
    if best != "amx":
        take(native_path, "amx", monkeypatch)
        with pytest.raises(RacError, match=f"RAC_KERNEL=amx: this machine runs {best} at best"):
            support()


def test_the_kernels_can_be_turned_off(native_path, monkeypatch):
    take(native_path, "off", monkeypatch)
    assert support().isa is None
    assert "RAC_KERNEL=off" in support().reason
    with pytest.raises(RacError, match="keep the weight dense"):
        pack(torch.ones(8), torch.full((1, 1), 255, dtype=torch.uint8), 8)


def test_without_a_compiler_the_reason_and_the_next_step_are_shown(without_library):
    assert support().isa is None
    assert "not built" in support().reason
    assert "install a C++ compiler" in support().reason
    with pytest.raises(RacError, match="install a C\\+\\+ compiler"):
        pack(torch.ones(8), torch.full((1, 1), 255, dtype=torch.uint8), 8)
    assert not choose(1024, 1024, 0.5, torch.bfloat16).sparse


def test_a_library_that_does_not_load_is_a_reason(tmp_path, monkeypatch):
    broken = tmp_path / "_native.so"
    broken.write_text("not a library")
    take(broken, None, monkeypatch)
    assert support().isa is None
    assert "does not load" in support().reason
    take(broken, "avx2", monkeypatch)
    with pytest.raises(RacError, match="RAC_KERNEL=avx2: no compiled kernel"):
        support()


AVX2 = Support("avx2", "AVX2 kernel")


def test_choosing_the_sparse_kernel(best):
    decision = choose(8960, 1536, 0.5, torch.bfloat16, AVX2)
    assert decision.sparse
    assert decision.kernel == "sparse kernel avx2"
    assert decision.bytes_per_weight == 1.125
    assert decision.ceiling == pytest.approx(16 / 9)
    assert choose(64, 64, 0.5, torch.float32, AVX2).bytes_per_weight == 2.125


def test_its_bytes_are_those_of_a_packed_weight(best):
    mask = random_mask(100, 1000, 0.4)
    _, weight = sparse(mask, torch.bfloat16)
    decision = choose(100, 1000, float(mask.float().mean()), torch.bfloat16, AVX2)
    assert decision.bytes_per_weight * mask.numel() == pytest.approx(weight.nbytes, abs=64 + 8 * 8 + 64 + 128)


@pytest.mark.parametrize(
    ("density", "dtype", "support", "reason"),
    [
        (0.9, torch.bfloat16, AVX2, "1.93 bytes a weight instead of 2: at most 1.04x"),
        (0.5, torch.float16, AVX2, "2.12 bytes a weight instead of 2"),
        (0.5, torch.float64, AVX2, "no sparse kernel reads torch.float64"),
        (0.5, torch.bfloat16, Support("portable", ""), "slower than a dense product"),
        (0.5, torch.bfloat16, Support(None, "no compiled kernel: why"), "no compiled kernel: why"),
    ],
)
def test_dense_has_its_reason(density, dtype, support, reason, monkeypatch):
    monkeypatch.delenv("RAC_KERNEL", raising=False)
    decision = choose(1024, 1024, density, dtype, support)
    assert not decision.sparse
    assert decision.kernel == "dense"
    assert decision.reason.startswith("dense because")
    assert reason in decision.reason


def test_the_portable_kernel_can_be_asked_for(native_path, monkeypatch):
    take(native_path, "portable", monkeypatch)
    assert choose(1024, 1024, 0.5, torch.bfloat16).sparse


def test_no_such_weight(best):
    for rows, columns, density in ((0, 8, 0.5), (8, -1, 0.5), (8, 8, 1.5), (8, 8, float("nan"))):
        with pytest.raises(RacError, match="a weight"):
            choose(rows, columns, density, torch.bfloat16)


def test_loading_the_module_again_registers_nothing_twice(best):
    importlib.reload(linear)
    importlib.reload(kernels)
    dense, weight = sparse(random_mask(16, 32, 0.5), torch.float32)
    x = torch.randn(2, 32)
    assert_product(kernels.sparse_linear(x, weight), x, dense)


def test_torch_checks_the_operator(best):
    _, weight = sparse(random_mask(16, 32, 0.5), torch.float32)
    for x in (torch.randn(2, 32), torch.randn(2, 3, 32)):
        torch.library.opcheck(torch.ops.rac_modifier.sparse_linear, (x, weight.data, 16, 32, torch.randn(16)))


def test_compiled_as_one_graph_for_any_number_of_rows(best):
    _, weight = sparse(random_mask(16, 32, 0.5), torch.float32)
    step = torch.compile(lambda x: sparse_linear(x * 2, weight) + 1, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (1, 2, 5, 70):
        x = torch.randn(m, 32)
        assert torch.equal(step(x), sparse_linear(x * 2, weight) + 1)
