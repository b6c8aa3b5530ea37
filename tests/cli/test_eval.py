import json
import re

import pytest


def test_eval_compares_models(rac, tiny_folder, sparse_folder, tmp_path):
    results = tmp_path / "eval.json"
    code, stdout, _ = rac("eval", tiny_folder, sparse_folder, "--problems", 4, "--cap", 8, "--json", results)
    assert code == 0
    assert re.search(rf"{re.escape(str(sparse_folder))}\s.*%", stdout)
    rows = json.loads(results.read_text())["results"]
    assert [row["label"] for row in rows] == [str(tiny_folder), str(sparse_folder)]
    assert {row["problems"] for row in rows} == {4}


def test_eval_divergence(rac, tiny_folder, tmp_path):
    plot, results = tmp_path / "d.png", tmp_path / "d.json"
    options = ("--divergence", "--problems", 4, "--cap", 12)
    code, stdout, _ = rac("eval", tiny_folder, tiny_folder, *options, "--plot", plot, "--json", results)
    assert code == 0
    assert "KL" in stdout
    (found,) = json.loads(results.read_text())["divergence"]
    assert found["kl"] == pytest.approx(0.0, abs=1e-5)  # of a model with itself
    assert found["agreement"] == 1.0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_eval_divergence_needs_two_models(rac, tiny_folder, tmp_path):
    assert "name at least two models" in rac("eval", tiny_folder, "--divergence")[2]
    assert "without --direct" in rac("eval", tiny_folder, tiny_folder, "--divergence", "--direct")[2]
    assert "give --divergence too" in rac("eval", tiny_folder, "--plot", tmp_path / "x.png")[2]
