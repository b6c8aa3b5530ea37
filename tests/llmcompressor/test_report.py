"""Progress, and what is said about routed experts."""

import json
import math
from types import SimpleNamespace

import pytest
from llmcompressor.modeling.moe.linearize import linearize_moe
from loguru import logger
from transformers import AutoModelForCausalLM

from rac_modifier import RacError
from rac_modifier.llmcompressor.report import ExpertReport, Progress, strict_json
from rac_modifier.pruning.routed_tokens import ExpertTokens
from rac_modifier.settings.entries import PruningEntry
from tests.tiny import entry, linears, save_tiny_experts, tiny_model


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
    return Progress(shapes, clock)


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
    progress = Progress({str(i): (4, 4) for i in range(4)}, clock)
    clock.now += 1
    progress.restored("0")
    assert progress.seconds_left == 0.0  # unknown
    clock.now += 10
    progress.done(["1"])
    assert progress.seconds_left == 20.0
    assert progress.record()["restored_modules"] == 1
    assert progress.record()["groups"] == [{"modules": ["1"], "seconds": 10.0}]
    progress.close()


LAYER = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return linearize_moe(
        AutoModelForCausalLM.from_pretrained(save_tiny_experts(tmp_path_factory.mktemp("moe")))
    )


@pytest.fixture
def said():
    lines = []
    handler = logger.add(
        lambda message: lines.append(str(message)), level="INFO", format="{level} {message}"
    )
    yield lines
    logger.remove(handler)


def record(model, **settings) -> ExpertReport:
    return ExpertReport(
        PruningEntry(**entry(**settings)), model, {m: n for n, m in linears(model).items()}
    )


def test_starved_experts_are_named(mixture, said):
    made = record(mixture, expert_floor=100)
    routed = [400, 30, 100, 0, 250, 9, 8, 7, 6, 5]
    made.use_order("group", "order: auto")
    made.add(
        LAYER, {f"{LAYER}.{i}": ExpertTokens(n, max(100 - n, 0)) for i, n in enumerate(routed)}
    )
    found = made.record()["experts"]
    assert (found["calibrated on"], found["floor"]) == ("routed", 100)
    layer = found["layers"][LAYER]
    assert layer["routed"] == {"least": 0, "median": 8.5, "most": 400}
    assert layer["starved"] == {
        f"{LAYER}.{i}": {"routed": routed[i], "added": 100 - routed[i]}
        for i in (1, 3, 5, 6, 7, 8, 9)
    }
    (line,) = [line for line in said if line.startswith("WARNING")]
    assert "expert_floor (100)" in line
    assert "experts 1 (30), 3 (0), 5 (9), 6 (8), 7 (7) and 2 more" in line


def test_tokens_that_were_added_without_asking_the_router_are_said_to_be_so(mixture, said):
    made = record(mixture)
    made.add(
        LAYER, {f"{LAYER}.0": ExpertTokens(1, 511, evenly=True), f"{LAYER}.1": ExpertTokens(900, 0)}
    )
    starved = made.record()["experts"]["layers"][LAYER]["starved"]
    assert starved == {f"{LAYER}.0": {"routed": 1, "added": 511, "evenly": True}}
    assert any("evenly spread since its router is not known" in line for line in said)


def test_layer_by_layer_says_that_all_tokens_are_used(mixture, said):
    made = record(mixture, reconstruct="pruned")
    made.use_order("layer", "tracing failed: x")
    assert made.record() == {
        "experts": {
            "calibrated on": "all",
            "why": "layer by layer (tracing failed: x)",
            "layers": {},
        }
    }
    assert any(line.startswith("WARNING experts: routed needs the model cut") for line in said)


@pytest.mark.parametrize(("name", "value"), [("experts", "all"), ("expert_floor", 64)])
def test_what_a_model_without_experts_does_not_use_is_refused(mixture, name, value):
    with pytest.raises(
        RacError, match=rf"{name}: .*{value}.* has no effect here: no routed expert .* leave it out"
    ):
        record(tiny_model(), **{name: value}).check(None)
    record(mixture, **{name: value}).check(None)
    record(tiny_model()).check(None)
    assert record(tiny_model()).record() == {}


def test_upstreams_switch_against_all_experts(mixture):
    off = SimpleNamespace(dataset_args=SimpleNamespace(moe_calibrate_all_experts=False))
    with pytest.raises(RacError, match="experts: all; leave one of them out"):
        record(mixture, experts="all").check(off)
    record(mixture).check(off)
    on = SimpleNamespace(dataset_args=SimpleNamespace(moe_calibrate_all_experts=True))
    record(mixture, experts="all").check(on)


def test_numbers_that_are_not_finite_are_recorded_by_their_names():
    record = {"a": [math.nan, 1.0, (2, True)], "b": {"c": -math.inf, "d": None, "e": "nan"}}
    assert json.dumps(strict_json(record), allow_nan=False) == json.dumps(
        {"a": ["nan", 1.0, [2, True]], "b": {"c": "-inf", "d": None, "e": "nan"}}
    )
