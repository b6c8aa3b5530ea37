"""The compiled library: which files are accepted, and what a refusal of its functions becomes."""

import re

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import ABI, Library, load
from rac_modifier.kernels.cpu.support import support
from tests.kernels.cpu.kernel_helpers import Packed, random_mask, run, sparse, take

BF16 = 0  # of csrc/format/layout.h


def test_what_is_no_library_is_a_reason(tmp_path, monkeypatch):
    broken = tmp_path / "_native.so"
    broken.write_text("not a library")
    take(broken, None, monkeypatch)
    assert load()[0] is None
    assert "does not load" in load()[1]
    assert (support().isa, support().status) == (None, "broken")
    take(broken, "avx2", monkeypatch)
    with pytest.raises(RacError, match="RAC_KERNEL=avx2: no compiled kernel"):
        support()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("const char* rac_pack() { return 0; }", f"another version .* 1 or none, {ABI} is needed"),
        (f"int rac_abi() {{ return {ABI + 1}; }}", f"its interface is {ABI + 1}, {ABI} is needed"),
        (f"int rac_abi() {{ return {ABI}; }}", "rac_kernels.*reinstall rac-modifier"),
    ],
    ids=["no number", "newer", "lacks a function"],
)
def test_a_library_of_another_version_is_a_reason(tmp_path, monkeypatch, best, source, says):
    (tmp_path / "other.cpp").write_text(f'extern "C" {source}')
    path = tmp_path / "_native.so"
    run("g++", "-shared", "-fPIC", str(tmp_path / "other.cpp"), "-o", str(path))
    take(path, None, monkeypatch)
    assert support().isa is None
    assert re.search(f"^no compiled kernel: _native.so .*{says}", support().reason)
    assert "\n" not in support().reason


@pytest.fixture
def weight(best) -> Packed:
    return sparse(random_mask(20, 40, 0.5), torch.bfloat16)[1]


def test_a_refusal_names_the_buffer_and_the_next_step(native_path, weight):
    library = Library(native_path)
    data = weight.data.clone()
    data[24] = 41  # columns, behind magic (8), type (4), padding (4) and rows (8)
    x, out = torch.randn(3, 40), torch.zeros(3, 20)
    says = r"sparse_linear .* x: 480 bytes, where \[3, 41\].*; pass tensors of the sizes"
    with pytest.raises(RacError, match=says):
        library.linear(data, 20, 41, x, None, None, out, "portable")
    with pytest.raises(RacError, match=r"packed weight \[20, 40\]: .*; load the checkpoint again"):
        library.check(weight.data[:-64], 20, 40, BF16)
    with pytest.raises(RacError, match="cannot be expanded: out: "):
        library.expand(*weight, 0, 2, torch.zeros(40, 31), "portable")
    assert library.value_type(weight.data) == BF16
    assert library.value_type(weight.data[:-64]) == -1
