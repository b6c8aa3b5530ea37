"""`rac eval` with answers in a file: what is refused before anything is loaded, and a served model paired with a dense one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rac_modifier.cli.answering import Answering
from rac_modifier.errors import RacError
from tests.sampling import fake_vllm
from tests.sampling.fake_server import FakeServer, shorten_pauses


def answering(**changes) -> Answering:
    return Answering(**{"servers": (), "concurrency": 4, "samples": 1, "path": None, **changes})


def check(one: Answering, models=("a",), divergence=False, temperature=None) -> None:
    one.check(models, divergence=divergence, temperature=temperature)


def test_answers_are_kept_for_servers_files_and_several_answers_only() -> None:
    assert not answering().keeps_answers
    assert answering(servers=("http://127.0.0.1:1",)).keeps_answers
    assert answering(serve=True).keeps_answers
    assert answering(path=Path("a.jsonl")).keeps_answers
    assert answering(samples=2).keeps_answers


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"samples": 4},
            {},
            "--samples 4 at temperature 0 are the same answer; give --temperature",
        ),
        ({"samples": 4}, {"temperature": 0.0}, "--samples 4 at temperature 0"),
        (
            {"path": Path("a.jsonl")},
            {"divergence": True},
            "--divergence asks .* leave --server, --serve, --samples, --answers out",
        ),
        ({"servers": ("http://a",)}, {"divergence": True}, "--divergence asks"),
        (
            {"serve": True, "servers": ("http://a",)},
            {},
            "--serve starts a server, and --server http://a names one",
        ),
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


@pytest.mark.parametrize(
    ("changes", "written", "message"),
    [
        (
            {"path": Path("a.jsonl")},
            "concurrency",
            "--concurrency 4 is for --server and --serve; leave it out, or set --b",
        ),
        ({"served_as": "m"}, "served_as", "--served-as m is for --server; leave it out"),
        (
            {"served_as": "m", "serve": True},
            "served_as",
            "--served-as m is for --server; leave it out",
        ),
        (
            {"servers": ("http://a",)},
            "batch_size",
            "--batch-size is for a model in this process; .* set --concurrency",
        ),
        ({"servers": ("http://a",)}, "precision", "--precision is for a model that is loaded here"),
        (
            {"servers": ("a",)},
            "source",
            "--server: base_urls: 'a' is no address of a server; write it like http://",
        ),
    ],
)
def test_an_option_without_effect_and_a_wrong_address_are_refused(
    changes, written, message
) -> None:
    with pytest.raises(RacError, match=message):
        answering(**changes).check(("a",), divergence=False, temperature=None, written={written})


def test_several_answers_of_several_models_have_files_of_their_own() -> None:
    check(answering(samples=2), models=("a", "b"), temperature=0.6)


def test_a_served_model_is_paired_with_the_dense_one(
    rac, tiny_folder, tmp_path, monkeypatch
) -> None:
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


def test_a_server_of_another_model_is_refused_before_it_is_asked(
    rac, tiny_folder, tmp_path, monkeypatch
) -> None:
    """The dense model in the place of the compressed one would be judged as the compressed one."""
    monkeypatch.chdir(tmp_path)
    server = FakeServer()
    server.cards = [{"id": "m", "root": "/models/another", "max_model_len": 512}]
    command = ("eval", tiny_folder, "--problems", 3, "--cap", 8, "--server", server.url)
    try:
        code, _, err = rac(*command)
        assert code == 1
        assert (
            f"serves 'another', and the model is '{tiny_folder.name}'; name the model that is"
            in err
        )
        assert all(body["max_tokens"] != 8 for body in server.bodies), "no problem was asked"
        code, _, err = rac(*command, "--served-as", "n")
        assert code == 1
        assert "does not serve 'n', but 'm'" in err
        assert rac(*command, "--served-as", "m")[0] == 0
    finally:
        server.close()


def test_a_file_that_holds_no_results_is_refused(rac, tiny_folder, tmp_path) -> None:
    (tmp_path / "other.json").write_text("{}")
    code, _, err = rac("eval", tiny_folder, "--baseline", tmp_path / "other.json")
    assert code == 1
    assert "other.json holds no accuracies; write it with: rac eval DENSE --json" in err


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A fake `vllm`, which notes its processes in the folder that this returns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAC_VLLM", str(fake_vllm.install(tmp_path)))
    shorten_pauses(monkeypatch)
    return tmp_path


def test_each_model_is_served_in_turn_by_a_server_that_is_stopped(
    rac, tiny_folder, sparse_folder, vllm
) -> None:
    few = ("--problems", 3, "--cap", 8, "--precision", "float32", "--json", "-")
    code, out, err = rac("eval", tiny_folder, sparse_folder, "--serve", *few)
    assert code == 0, err
    assert [one["label"] for one in json.loads(out)["results"]] == [
        str(tiny_folder),
        str(sparse_folder),
    ]
    assert [start["argv"][1] for start in fake_vllm.starts(vllm)] == [
        str(tiny_folder),
        str(sparse_folder),
    ]
    assert {start["argv"][-1] for start in fake_vllm.starts(vllm)} == {"float32"}
    assert fake_vllm.left_over(vllm) == []


def test_a_server_that_does_not_start_is_an_error_with_its_last_lines(
    rac, tiny_folder, vllm, monkeypatch
) -> None:
    monkeypatch.setenv(fake_vllm.FAULT, "crash")
    code, _, err = rac("eval", tiny_folder, "--serve", "--problems", 3)
    assert code == 1
    assert err.rstrip().endswith("ValueError: the KV cache does not fit")


def test_a_server_that_dies_keeps_the_answers_so_far(rac, tiny_folder, vllm, monkeypatch) -> None:
    options = (
        "--serve",
        "--problems",
        12,
        "--cap",
        8,
        "--concurrency",
        1,
        "--answers",
        "a.jsonl",
        "--json",
        "-",
    )
    monkeypatch.setenv(fake_vllm.FAULT, "dies")
    code, _, err = rac("eval", tiny_folder, *options)
    assert code == 1
    assert "vllm serve stopped with exit code 5" in err
    assert err.rstrip().endswith("RuntimeError: the engine died")
    kept = (vllm / "a.jsonl").read_bytes()
    assert len(kept.splitlines()) > 1
    monkeypatch.delenv(fake_vllm.FAULT)
    code, out, err = rac("eval", tiny_folder, *options)
    assert code == 0, err
    assert json.loads(out)["results"][0]["problems"] == 12
    assert (vllm / "a.jsonl").read_bytes().startswith(kept)
    assert fake_vllm.left_over(vllm) == []


def test_without_vllm_nothing_is_loaded(rac, tiny_folder, monkeypatch) -> None:
    monkeypatch.setenv("RAC_VLLM", "/no/vllm")
    code, _, err = rac("eval", tiny_folder, "--serve")
    assert (code, "RAC_VLLM='/no/vllm' is no command" in err) == (1, True)


def test_a_long_answer_has_time(tiny_folder, monkeypatch) -> None:
    one = answering(servers=("http://127.0.0.1:1",))
    for cap, seconds in ((100, 600), (32768, 8192)):
        with one._engine("m", "auto", cap) as engine:
            assert (engine.timeout, engine.concurrency) == (seconds, 4)
    with answering()._engine("m", "auto", 100) as engine:
        assert engine is None
