"""float32 products through oneDNN: the same as torch's, and only where they are chosen."""

import pytest
import torch

from rac_modifier import float32_products
from rac_modifier.float32_products import (
    FasterLinears,
    add_product,
    one_of_few_sizes,
    product,
    with_rows_of_zeros,
)
from tests.pruning.pruning_reference import assert_near, gaussian

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
choose = float32_products._on_this_cpu.__wrapped__


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Gives all float32 products to oneDNN, whatever the processor; the shapes of those that it computed."""
    found, inner = list[tuple[int, ...]](), float32_products._onednn

    def noting(x, weight, bias=None):
        found.append((*x.shape, weight.shape[0]))
        return inner(x, weight, bias)

    monkeypatch.setattr(float32_products, "_on_this_cpu", lambda: True)
    monkeypatch.setattr(float32_products, "_LEAST", 100)
    monkeypatch.setattr(float32_products, "_LEAST_ROWS", 50)
    monkeypatch.setattr(float32_products, "_onednn", noting)
    return found


def of_layout(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """A matrix that lies row by row, column by column, or as a part of a larger one."""
    if kind == "columns":
        return gaussian(columns, rows, seed=seed).T
    if kind == "part":
        return gaussian(rows + 3, columns + 5, seed=seed)[2 : rows + 2, 1 : columns + 1]
    if kind == "part of columns":
        return gaussian(columns + 3, rows + 5, seed=seed)[2 : columns + 2, 1 : rows + 1].T
    return gaussian(rows, columns, seed=seed)


LAYOUTS = ("rows", "columns", "part", "part of columns")


@pytest.mark.parametrize("of_b", LAYOUTS)
@pytest.mark.parametrize("of_a", LAYOUTS)
def test_products_are_those_of_torch_in_every_layout(of_a, of_b, calls, monkeypatch):
    monkeypatch.setattr(float32_products, "_ROWS", 20)
    a, b, out = of_layout(of_a, 50, 40, 1), of_layout(of_b, 40, 30, 2), of_layout("part", 50, 30, 3)
    terms, before = 40 * torch.finfo(torch.float32).eps, out.double()
    exact = a.double() @ b.double()
    assert_near(product(a, b), exact, terms)
    assert add_product(out, a, b, alpha=-2.0).data_ptr() == out.data_ptr()
    assert_near(out, before - 2 * exact, terms)
    assert calls == [(50, 40, 30), (20, 40, 30), (20, 40, 30), (10, 40, 30)]


def test_what_is_small_or_not_float32_stays_with_torch(calls, monkeypatch):
    a, b = gaussian(50, 40, dtype=torch.float64), gaussian(40, 30, seed=1, dtype=torch.float64)
    assert torch.equal(product(a, b), a @ b)
    ones = torch.ones(50, 30, dtype=torch.float64)
    assert torch.equal(add_product(ones.clone(), a, b), torch.addmm(ones, a, b))
    monkeypatch.setattr(float32_products, "_LEAST", 50 * 40 * 30 + 1)
    product(a.float(), b.float())
    assert calls == []
    monkeypatch.setattr(float32_products, "_LEAST", 50 * 40 * 30)
    product(a[:49].float(), gaussian(40, 31))
    assert calls == []
    product(a.float(), b.float())
    assert calls == [(50, 40, 30)]


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_are_computed_so_while_the_mode_is_in_place(bias, calls):
    layer, x = torch.nn.Linear(40, 30, bias=bias), gaussian(2, 25, 40)
    with torch.no_grad():
        expected = layer.double()(x.double())
        with FasterLinears():
            found = layer.float()(x)
        assert calls == [(52, 40, 30)], "50 tokens, and two of zeros"
        layer(x)
    with FasterLinears():
        assert layer(x).requires_grad, "training keeps torch's own"
        with torch.no_grad():
            layer.bfloat16()(x.bfloat16())
    assert len(calls) == 1
    assert_near(found, expected, 40 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ("has", "chosen"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, True),
        ({"cpu_name": "AMD Ryzen 7", "avx2": True}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_it_is_chosen_by_processor(has, chosen, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert choose() == chosen
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not choose()
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.10
    assert not choose()


def test_no_other_device_is_asked_about(monkeypatch):
    monkeypatch.setattr(float32_products, "_on_this_cpu", lambda: True)
    assert float32_products.onednn_is_faster(torch.device("cpu"))
    assert not float32_products.onednn_is_faster(torch.device("meta"))


def test_torch_still_has_the_operator_and_names_the_processor():
    """The operator that torch's compiler uses for linear layers; the name is in the table of capabilities."""
    schema = str(torch.ops.mkldnn._linear_pointwise.default._schema)
    assert schema.startswith("mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, ")
    capabilities = torch.cpu.get_capabilities()
    assert capabilities["architecture"] != "x86_64" or isinstance(capabilities["cpu_name"], str)


def test_numbers_of_tokens_become_a_few_sizes():
    """Those that are a multiple of 512 up to 8,192 stay as they are."""
    sizes = [one_of_few_sizes(count) for count in range(1, 4097)]
    assert all(count <= size <= 1.125 * count for count, size in enumerate(sizes, 1))
    assert len(set(sizes[2047:])) == 9
    assert all(
        one_of_few_sizes(count) == count for count in (*range(1, 17), *range(512, 8193, 512))
    )
    x = torch.randn(1000, 3)
    assert with_rows_of_zeros(x[:896]).data_ptr() == x.data_ptr()
    longer = with_rows_of_zeros(x)
    assert torch.equal(longer[:1000], x)
    assert longer.shape == (1024, 3)
    assert not longer[1000:].any()


def test_linear_layers_are_given_few_numbers_of_tokens(calls):
    layer = torch.nn.Linear(40, 30)
    with torch.no_grad(), FasterLinears():
        for count in range(500, 520):
            x = gaussian(1, count, 40)
            assert layer(x).shape == (1, count, 30)
            torch.testing.assert_close(
                layer(x), x @ layer.weight.T + layer.bias, rtol=1e-4, atol=1e-4
            )
    assert set(calls) == {(512, 40, 30), (576, 40, 30)}
