"""`rac eval` with answers in a file: what is refused before anything is loaded, and a served model paired with a dense one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rac_modifier.cli.answering import Answering
from rac_modifier.errors import RacError
from tests.sampling.fake_server import FakeServer


def answering(**changes) -> Answering:
    return Answering(**{"servers": (), "concurrency": 4, "samples": 1, "path": None, **changes})


def check(one: Answering, models=("a",), divergence=False, direct=False, temperature=None) -> None:
    one.check(models, divergence=divergence, direct=direct, temperature=temperature)


def test_it_is_wanted_for_servers_files_and_several_answers_only() -> None:
    assert not answering().wanted
    assert answering(servers=("http://127.0.0.1:1",)).wanted
    assert answering(path=Path("a.jsonl")).wanted
    assert answering(samples=2).wanted


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"samples": 4}, {}, "--samples 4 at temperature 0 are the same answer; give --temperature"),
        ({"samples": 4}, {"temperature": 0.0}, "--samples 4 at temperature 0"),
        ({"path": Path("a.jsonl")}, {"direct": True}, "--direct asks .* leave --server, --samples, --answers out"),
        ({"servers": ("http://a",)}, {"divergence": True}, "--divergence asks"),
        (
            {"servers": ("http://a",)},
            {"models": ("a", "b")},
            "2 models are named, and --server and --answers are for one",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, options, message) -> None:
    with pytest.raises(RacError, match=message):
        check(answering(**changes), **options)
    check(answering(), **{**options, "models": ("a",)})


def test_several_answers_of_several_models_have_files_of_their_own() -> None:
    check(answering(samples=2), models=("a", "b"), temperature=0.6)


def test_a_served_model_is_paired_with_the_dense_one(rac, tiny_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("--problems", 3, "--cap", 8)
    assert rac("eval", tiny_folder, *few, "--json", "dense.json")[0] == 0
    server = FakeServer()
    server.cards = [{"id": "tiny", "root": str(tiny_folder), "max_model_len": 512}]
    try:
        options = ("--server", server.url, "--baseline", "dense.json", "--json", "-")
        code, out, err = rac("eval", tiny_folder, *few, *options)
        assert code == 0, err
        found = json.loads(out)
        assert found["results"][0]["problems"] == 3
        assert found["paired"][0]["problems"] == 3
        assert len(list((tmp_path / "rac_answers").glob("*.jsonl"))) == 1
        asked = len(server.bodies)
        code, out, err = rac("eval", tiny_folder, *few, *options[:4])
        assert code == 0, err
        assert len(server.bodies) == asked
        assert "McNemar p = 1" in out
    finally:
        server.close()


def test_a_file_that_holds_no_results_is_refused(rac, tiny_folder, tmp_path) -> None:
    (tmp_path / "other.json").write_text("{}")
    code, _, err = rac("eval", tiny_folder, "--baseline", tmp_path / "other.json")
    assert code == 1
    assert "other.json holds no accuracies; write it with: rac eval DENSE --json" in err
