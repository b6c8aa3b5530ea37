"""`rac eval --preset`: what the preset sets, what an option replaces, and that the output says so."""

from __future__ import annotations

import json

import pytest

from rac_modifier.cli.protocol import Protocol
from rac_modifier.errors import RacError
from rac_modifier.evaluation.presets import PRESETS

DEFAULTS = {
    "source": "arithmetic", "column": None, "answer_column": None, "problems": 300, "samples": 1, "cap": 512,
    "temperature": None, "top_p": None,
}  # fmt: skip


def asked(preset=None, **written) -> Protocol:
    return Protocol(**{**DEFAULTS, **written}).with_preset(preset, set(written))


def check(protocol, divergence=False):
    protocol.check(divergence=divergence)


@pytest.fixture
def copy_of_gpqa(tmp_path):
    """Three questions in the published layout."""
    wrong = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    rows = [
        {"Question": f"Q{i}?", "Correct Answer": "y", **dict.fromkeys(wrong, "n")} for i in range(3)
    ]
    (tmp_path / "gpqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "gpqa.jsonl"


def test_without_a_preset_the_options_stand():
    protocol = asked(problems=4, temperature=0.7)
    assert protocol == Protocol(**{**DEFAULTS, "problems": 4, "temperature": 0.7})
    assert protocol.where() == {"source": "arithmetic", "column": None, "answer_column": None}
    assert protocol.limits() == {"max_new_tokens": 512, "temperature": 0.7, "top_p": 0.95}
    assert protocol.describe(4) == []
    assert protocol.verifiers() == {}
    assert len(protocol.load(0)) == 4


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_all_of_it(name):
    preset, protocol = PRESETS[name], asked(name)
    assert protocol.problems is None  # all
    assert (protocol.samples, protocol.cap) == (preset.samples, preset.cap)
    assert protocol.limits() == {"max_new_tokens": 32768, "temperature": 0.6, "top_p": 0.95}
    assert protocol.where() == {
        "source": preset.source, "config": preset.config, "split": preset.split,
        "column": preset.layout.column, "answer_column": preset.layout.answer_column,
    }  # fmt: skip
    (line,) = protocol.describe(preset.problems)
    assert line.startswith(f"Preset {name}: {preset.problems} problems, {preset.samples} answer")
    assert "Not as published" not in line
    assert protocol.record(preset.problems)["published"] == {"problems": preset.problems}


def test_options_replace_it_and_are_named():
    protocol = asked("math-500", samples=2, cap=100, temperature=0.0, top_p=0.9, problems=7)
    assert (protocol.samples, protocol.problems) == (2, 7)
    assert protocol.limits() == {"max_new_tokens": 100, "temperature": 0.0, "top_p": 0.9}
    (line,) = protocol.describe(7)
    assert line == (
        "Preset math-500: 7 problems, 2 answers each, temperature 0, top-p 0.9, at most 100 new tokens. "
        "Not as published (samples is 4, cap is 32768, temperature is 0.6, top-p is 0.95, problems is 500 there)."
    )
    assert protocol.record(7)["published"]["samples"] == 4


def test_an_option_with_the_published_value_is_no_difference():
    assert (
        "Not as published"
        not in asked("math-500", samples=4, cap=32768, problems=500).describe(500)[0]
    )


def test_an_option_with_the_value_of_its_default_replaces_the_preset():
    assert asked("math-500", cap=512, samples=1).limits()["max_new_tokens"] == 512


def test_a_copy_is_read_without_the_datasets_configuration(tmp_path):
    protocol = asked("gsm8k", source="mine.parquet")
    assert protocol.where() == {
        "source": "mine.parquet",
        "column": "question",
        "answer_column": "answer",
    }
    assert asked("gsm8k", source="me/mirror").where()["split"] == "test"
    assert asked("gsm8k", source="me/mirror").where()["config"] is None
    assert asked("gsm8k", source="openai/gsm8k").where()["config"] == "main"


@pytest.mark.parametrize(
    ("preset", "written", "options", "message"),
    [
        ("gsm8k", {}, {"divergence": True}, "--preset gsm8k .* leave it or --divergence out"),
        (
            "gsm8k",
            {"source": "reasoning-gym:gcd"},
            {},
            "--preset gsm8k cannot ask --source reasoning-gym:gcd",
        ),
        (None, {"top_p": 0.9}, {}, "--top-p 0.9 has no effect on greedy answers"),
        (
            "gsm8k",
            {"temperature": 0.0, "top_p": 0.9},
            {},
            "--top-p 0.9 has no effect on greedy answers",
        ),
        (None, {"top_p": 0.0, "temperature": 1.0}, {}, "--top-p 0 is not a share"),
        ("gsm8k", {"top_p": 1.1}, {}, "--top-p 1.1 is not a share"),
        ("gsm8k", {"top_p": float("nan")}, {}, "--top-p nan is not a share"),
    ],
)
def test_what_cannot_be_is_refused(preset, written, options, message):
    with pytest.raises(RacError, match=message):
        check(asked(preset, **written), **options)


def test_top_p_shapes_a_divergence():
    check(asked(top_p=0.9), divergence=True)


def test_what_checks_answers_must_be_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RacError, match=r"needs math-verify; pip install 'rac-modifier\[eval\]'"):
        check(asked("math-500"))
    check(asked("gpqa-diamond"))


def test_a_dataset_that_cannot_be_loaded_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        RacError, match=r"--preset gpqa-diamond: .*no network.*accept their terms.*--source FILE"
    ):
        asked("gpqa-diamond").load(0)
    with pytest.raises(
        RacError,
        match=r"--preset math-500: .*those of HuggingFaceH4/MATH-500; a copy with the same",
    ):
        asked("math-500").load(0)


def test_the_command_asks_a_copy(rac, tiny_folder, tmp_path, copy_of_gpqa, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--source", copy_of_gpqa, "--samples", 2, "--cap", 8)
    code, out, err = rac(
        "eval", tiny_folder, "--preset", "gpqa-diamond", *options, "--json", "r.json"
    )
    assert code == 0, err
    assert (
        "Preset gpqa-diamond: 3 problems, 2 answers each, temperature 0.6, top-p 0.95, at most 8 new tokens."
        in out
    )
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["results"][0]["problems"], found["results"][0]["samples"]) == (3, 2)
    assert found["protocol"]["preset"] == "gpqa-diamond"
    assert found["protocol"]["published"] == {
        "problems": 198, "source": "Idavidrein/gpqa", "samples": 8, "cap": 32768,
    }  # fmt: skip
    assert list(found["results"][0]["per_task"]) == ["gpqa-diamond"]


@pytest.mark.parametrize("extra", [(), ("--answers", "a.jsonl")])
def test_letters_are_checked_as_letters(
    rac, tiny_folder, tmp_path, copy_of_gpqa, monkeypatch, extra
):
    """In both ways of asking: a letter among words would not be equal as mathematics."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def check_letter(text, answer, verifier):
        seen.append((answer, verifier))
        return True

    monkeypatch.setattr("rac_modifier.evaluation.accuracy.is_correct", check_letter)
    options = ("--source", copy_of_gpqa, "--samples", 1, "--cap", 4, *extra)
    code, _, err = rac("eval", tiny_folder, "--preset", "gpqa-diamond", *options)
    assert code == 0, err
    assert len(seen) == 3
    for answer, verifier in seen:
        assert verifier(f"({answer}) y", answer)
