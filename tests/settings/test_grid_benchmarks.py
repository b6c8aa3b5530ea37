import pytest
from pydantic import ValidationError

from rac_modifier.settings.grid import GridEvaluation
from rac_modifier.settings.grid_benchmarks import GridBenchmark


def test_what_is_not_set_is_left_to_the_preset():
    written = GridBenchmark(preset="math-500", samples=2)
    assert written.model_dump(exclude_none=True) == {"preset": "math-500", "samples": 2}
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        GridBenchmark(preset="math-500", samples=0)


def test_a_benchmark_twice_and_a_concurrency_without_a_server_are_refused():
    with pytest.raises(ValidationError, match="names aime24 twice"):
        GridEvaluation(benchmarks=[{"preset": "aime24"}, {"preset": "aime24", "cap": 9}])
    with pytest.raises(ValidationError, match="concurrency=256 is for a server; set serve: true"):
        GridEvaluation(concurrency=256)
    assert GridEvaluation(serve=True, concurrency=256).concurrency == 256


def test_a_folder_of_an_older_version_is_gone_on_with():
    """What its frontier.json holds; benchmarks may be added to it."""
    older = {
        "source": "arithmetic", "column": None, "answer_column": None, "problems": 100, "cap": 512, "temperature": 0.0,
        "top_p": None, "batch_size": 64, "seed": 0, "serve": False,
    }  # fmt: skip
    assert GridEvaluation().of_rows() == older
    assert GridEvaluation(benchmarks=[{"preset": "aime24"}]).of_rows() == older
    changed = GridEvaluation(
        source="a/b", column="q", split="test", serve=True, concurrency=9
    ).of_rows()
    assert changed == {
        **older,
        "source": "a/b",
        "column": "q",
        "split": "test",
        "serve": True,
        "concurrency": 9,
    }
