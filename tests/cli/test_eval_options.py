"""The options of `rac eval`: contradictions, what a preset sets, and what an option replaces."""

import json

import pytest

from rac_modifier.cli.eval_options import EvalOptions
from rac_modifier.errors import RacError
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import PromptSettings


def asked(preset=None, **written) -> EvalOptions:
    given = {"models": ["m"], **({} if preset is None else {"preset": preset}), **written}
    return check_settings(EvalOptions, given, "rac eval")


def sampled(options):
    """Cap, temperature, top-p and top-k."""
    sampling = options.sampling(PromptSettings())
    return sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k


def test_too_many_answers_in_progress_are_refused_before_a_server_starts(rac):
    assert rac("eval", "reasoner", "--serve", "--concurrency", 5000)[0] == 2


def test_without_a_preset_the_options_count():
    protocol = asked(problems=4, temperature=0.7)
    assert protocol.problem_source == ProblemSource(source="arithmetic")
    assert sampled(protocol) == (512, 0.7, 0.95, 0)
    assert sampled(asked()) == (512, 0.0, 0.95, 0)
    assert sampled(asked(models=["m", "n"], divergence=True)) == (512, None, None, None), (
        "the model's own"
    )
    assert (protocol.describe_preset(), protocol.verifier) == ([], None)
    assert len(protocol.load_problems()) == 4


def test_options_replace_it_and_are_named():
    protocol = asked("math-500", samples=2, cap=512, temperature=0.1, top_p=0.9, problems=7)
    assert sampled(protocol) == (512, 0.1, 0.9, 0)
    (line,) = protocol.describe_preset()
    assert line == (
        "Preset math-500: 7 problems, 2 answers each, temperature 0.1, top-p 0.9, at most 512 new "
        "tokens. Not as published (samples is 4, cap is 32768, temperature is 0.6, top-p is 0.95, "
        "problems is 500 there)."
    )
    published = asked("math-500", samples=4, cap=32768, problems=500)
    assert published.changed == {}


def test_a_copy_is_read_without_the_datasets_configuration():
    columns = {"column": "question", "answer_column": "answer"}
    file = asked("gsm8k", source="my.parquet").problem_source
    assert file == ProblemSource(source="my.parquet", **columns)
    for source, config in (("me/mirror", None), ("openai/gsm8k", "main")):
        actual = asked("gsm8k", source=source).problem_source
        assert (actual.split, actual.config) == ("test", config)


def test_a_dataset_that_cannot_be_loaded_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(RacError, match=r"--preset gpqa-diamond: .*no network.*--source FILE"):
        asked("gpqa-diamond").load_problems()


def test_the_command_asks_a_copy_and_checks_letters_as_letters(
    rac, tiny_folder, tmp_path, monkeypatch
):
    """A letter among words would not be equal as mathematics."""
    wrong = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    same = {"Correct Answer": "y", **dict.fromkeys(wrong, "n")}
    rows = [{"Question": f"Q{i}?", **same} for i in range(3)]
    (tmp_path / "gpqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    def check_letter(text, answer, verifier):
        seen.append(verifier(f"({answer}) y", answer))
        return True

    monkeypatch.setattr("rac_modifier.evaluation.stopping.is_correct", check_letter)
    options = ("--source", "gpqa.jsonl", "--samples", 1, "--cap", 4, "--problems", 3)
    options += ("--json", "r.json")
    out = rac.output("eval", tiny_folder, "--preset", "gpqa-diamond", *options)
    assert seen == [True] * 3
    assert "Preset gpqa-diamond: 3 problems, 1 answer each, temperature 0.6, top-p 0.95" in out
    results = json.loads((tmp_path / "r.json").read_text())
    assert list(results["results"][0]["per_task"]) == ["gpqa-diamond"]
    assert results["protocol"]["published"] == {
        "problems": 198, "source": "Idavidrein/gpqa", "samples": 8, "cap": 32768,
    }  # fmt: skip
