"""`rac head`, on a tiny model."""

from __future__ import annotations

import json

import pytest

FEW = ("--sequences", 4, "--cap", 12)


def test_a_table_and_the_same_figures_as_json(rac, tiny_folder):
    code, out, _ = rac("head", tiny_folder, *FEW)
    assert code == 0
    assert "int8" in out
    assert "KL(unrounded || rounded)" in out
    code, out, _ = rac("head", tiny_folder, "--bits", 4, *FEW, "--json")
    assert code == 0
    (found,) = json.loads(out)["heads"]
    assert (found["bits"], found["divergence"]["sequences"]) == (4, 4)
    assert 0 < found["divergence"]["kl"] < 0.1
    assert found["divergence"]["agreement"] > 0.5


def test_on_stored_traces(rac, tiny_folder, trace_store):
    code, out, _ = rac(
        "head", tiny_folder, "--traces", trace_store, "--sequences", 3, "--bits", 8, "--json"
    )
    assert code == 0
    assert json.loads(out)["heads"][0]["divergence"]["sequences"] == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--bits", 3), "--bits 3: a head can be rounded to 8 or 4 bits"),
        (
            ("--traces", "x.jsonl", "--batch-size", 2),
            "--batch-size is for sampling and has no effect on stored traces",
        ),
    ],
)
def test_what_is_refused(rac, tiny_folder, options, says):
    code, _, err = rac("head", tiny_folder, *options)
    assert code == 1
    assert says in err
