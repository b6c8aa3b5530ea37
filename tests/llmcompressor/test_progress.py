"""Times per group, and the time left, with a clock that the tests set."""

import json

import pytest
from loguru import logger

from rac_modifier.llmcompressor.progress import PruningProgress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines():
    said = []
    sink = logger.add(lambda message: said.append(message.record["message"]), level="INFO")
    yield said
    logger.remove(sink)


def made(shapes, clock):
    return PruningProgress(shapes, clock)


def test_a_groups_time_runs_from_the_end_of_the_group_before_it():
    clock = Clock()
    progress = made({"a": (2, 4), "b": (2, 4), "c": (4, 8)}, clock)
    clock.now += 3
    progress.done(["a", "b"])
    clock.now += 5
    progress.done(["c"])
    assert progress.record() == {
        "seconds": 8.0,
        "groups": [{"modules": ["a", "b"], "seconds": 3.0}, {"modules": ["c"], "seconds": 5.0}],
    }


def test_the_time_left_is_that_of_modules_of_the_same_shape():
    clock = Clock()
    progress = made(
        {"1.q": (4, 4), "1.d": (4, 16), "2.q": (4, 4), "2.d": (4, 16), "3.x": (2, 4)}, clock
    )
    assert progress.seconds_left == 0.0
    clock.now += 1
    progress.done(["1.q"])
    assert progress.seconds_left == pytest.approx(
        4 + 1 + 4 + 0.5
    )  # by weights, where no such shape is done
    clock.now += 8
    progress.done(["1.d"])
    assert progress.seconds_left == pytest.approx(1 + 8 + 9 / 80 * 8)
    clock.now += 3
    progress.done(["2.q"])
    assert progress.seconds_left == pytest.approx(8 + 12 / 96 * 8)


def test_a_groups_time_is_shared_out_by_weights():
    clock = Clock()
    progress = made({"1.gate": (6, 4), "1.k": (2, 4), "2.k": (2, 4)}, clock)
    clock.now += 4
    progress.done(["1.gate", "1.k"])
    assert progress.seconds_left == pytest.approx(1)


def test_without_a_terminal_about_ten_lines_are_logged(lines, capsys):
    clock = Clock()
    progress = made({str(i): (4, 4) for i in range(100)}, clock)
    for i in range(100):
        clock.now += 36
        progress.done([str(i)])
    progress.close()
    assert len(lines) == 10
    assert lines[0] == "pruned 10 of 100 modules, about 54 min 00 s left"
    assert lines[-1] == "pruned 100 of 100 modules, about 0 s left"
    assert capsys.readouterr().err.count("pruning") == 0


def test_a_run_records_its_times(prune, tmp_path):
    prune(output_dir=tmp_path / "group")
    prune(output_dir=tmp_path / "layer", preset="paper")
    for name in ("group", "layer"):
        time = json.loads((tmp_path / name / "rac_run.json").read_text())["time"]
        assert [len(group["modules"]) for group in time["groups"]] == [3, 1, 2, 1] * 2
        assert all(group["seconds"] >= 0 for group in time["groups"])
        assert sum(group["seconds"] for group in time["groups"]) == pytest.approx(
            time["seconds"], abs=0.01
        )


def test_modules_that_were_restored_count_as_done_and_tell_nothing_of_the_time_left():
    clock = Clock()
    progress = PruningProgress({str(i): (4, 4) for i in range(4)}, clock)
    clock.now += 1
    progress.restored("0")
    assert progress.seconds_left == 0.0  # unknown
    clock.now += 10
    progress.done(["1"])
    assert progress.seconds_left == 20.0
    assert progress.record()["restored_modules"] == 1
    assert progress.record()["groups"] == [{"modules": ["1"], "seconds": 10.0}]
    progress.close()
