"""What a run records about its divergence, and about more calibration tokens."""

from types import SimpleNamespace

import pytest
import torch

from rac_modifier.calibration.mixture import CalibrationSequence
from rac_modifier.evaluation import run_divergence
from rac_modifier.evaluation.divergence import divergence
from rac_modifier.evaluation.run_divergence import RunDivergence
from rac_modifier.traces.records import Trace
from tests.evaluation.test_dense_reference import sequences, shaken
from tests.tiny import tiny_model


def held_out(*, of: int = 4, calibrated: tuple[CalibrationSequence, ...] = ()) -> SimpleNamespace:
    """As much of a calibration set as is read here: the traces that it holds out, and the sequences of its loader."""
    traces = [
        Trace(f"{i}#0", str(i), tuple(ids[:prompt]), tuple(ids[prompt:]), "stop", 0, "?", None)
        for i, (ids, prompt) in enumerate(sequences())
    ]
    loader = SimpleNamespace(sequences=calibrated, settings=SimpleNamespace(seed=0))
    return SimpleNamespace(held_out=tuple(traces[:of]), loader=loader)


def test_a_run_records_its_divergence_on_the_held_out_traces():
    dense = tiny_model()
    pruned = shaken(dense)
    expected = divergence(dense, pruned, sequences(), label="x", bins=8, progress=False)
    record = RunDivergence(dense, held_out(), off_policy=False).measure(pruned)
    assert record["kl"] == pytest.approx(expected.kl, rel=1e-3)
    assert (record["sequences"], record["tokens"]) == (4, expected.tokens)
    assert len(record["bins"]) == 8
    assert "label" not in record
    assert "calibrated" not in record  # this set has no traces


@pytest.mark.parametrize(
    ("calibration", "off_policy", "why"),
    [
        (held_out(of=0), False, "no traces were held out"),
        (held_out(), True, "may be another model's"),
    ],
)
def test_a_run_that_measures_nothing_says_why(calibration, off_policy, why):
    found = RunDivergence(tiny_model(), calibration, off_policy=off_policy).measure(None)
    assert found.keys() == {"not_measured"}
    assert why in found["not_measured"]


def test_what_fails_is_recorded_and_ends_no_run():
    model = tiny_model()
    model.get_output_embeddings = lambda: None
    assert (
        "no output embeddings"
        in RunDivergence(model, held_out(), off_policy=False).measure(model)["not_measured"]
    )
    model = tiny_model()
    run = RunDivergence(model, held_out(), off_policy=False)
    model.lm_head.weight.data.mul_(1.01)
    assert "the output head was changed too" in run.measure(model)["not_measured"]


def calibration_sequences(kind: str, seed: int, number: int = 40) -> list[CalibrationSequence]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 300, (number, 30), generator=generator).tolist()
    return [CalibrationSequence(tuple(row), 10, kind) for row in ids]


def test_calibrated_traces_are_measured_too_as_many_tokens_of_them():
    """Of traces only, and of their completions only; the draw leaves the order of the calibration set as it is."""
    dense = tiny_model()
    pruned = shaken(dense)
    traces = calibration_sequences("traces", 2)
    others = [
        CalibrationSequence((*s.ids, 5), 10, "generic") for s in calibration_sequences("generic", 3)
    ]
    cut = [CalibrationSequence(s.ids, 30, "traces") for s in calibration_sequences("traces", 4, 5)]
    mixed = (*others, *cut, *traces)
    record = RunDivergence(dense, held_out(calibrated=mixed), off_policy=False).measure(pruned)
    held = sum(len(ids) - prompt for ids, prompt in sequences())
    found = record["calibrated"]
    assert held <= found["tokens"] < held + 20
    assert found["tokens"] % 20 == 0  # generic text would add 21
    rows = {
        round(divergence(dense, pruned, [(s.ids, 10)], label="x", progress=False).kl, 5): s
        for s in traces
    }  # each trace has its own KL
    assert len(rows) == len(traces)
    assert min(rows) < found["kl"] < max(rows)
    every = divergence(
        dense,
        pruned,
        [(s.ids, 10) for s in traces[: found["tokens"] // 20]],
        label="x",
        progress=False,
    )
    assert found["kl"] != pytest.approx(every.kl, rel=1e-4), "the first traces, not a draw"


@pytest.mark.parametrize(
    ("kl", "calibrated", "says"),
    [
        ((0.5, 0.02), (0.3, 0.01), "can win a part of the gap of 0.2000"),
        ((0.5, 0.1), (0.4, 0.1), "would change little"),
    ],
)
def test_the_gap_says_whether_more_tokens_would_help(kl, calibrated, says):
    def result(kl, stderr):
        return SimpleNamespace(kl=kl, kl_stderr=stderr, tokens=2048)

    line = run_divergence.outlook(result(*kl), result(*calibrated))
    assert line.startswith(f"on 2,048 calibrated tokens, KL is {calibrated[0]:.4f}")
    assert says in line


def test_there_is_no_outlook_on_figures_without_an_error():
    few = SimpleNamespace(kl=0.5, kl_stderr=None, tokens=9)
    assert run_divergence.outlook(few, SimpleNamespace(kl=0.4, kl_stderr=0.1, tokens=9)) is None


def test_no_more_tokens_than_asked_for_where_whole_traces_make_them_up():
    calibration = held_out(calibrated=tuple(calibration_sequences("traces", 2)))
    assert len(run_divergence._calibrated(calibration, 40)) == 2  # of 20 completion tokens each
    assert len(run_divergence._calibrated(calibration, 41)) == 3
