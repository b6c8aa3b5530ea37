"""Recovery inside a recipe: which traces it uses, what it changes, and what is recorded."""

from types import SimpleNamespace

import pytest

from rac_modifier import RacError
from rac_modifier.llmcompressor import calibration_modifier
from rac_modifier.recovery import memory, stage
from tests.llmcompressor.conftest import record_of
from tests.recovery.test_stage import RECOVER
from tests.tiny import linears


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """What recovery is given, and the loader of the calibration set."""
    made, inner = {}, stage.recover
    build = calibration_modifier.build_calibration_set

    def recover(model, teacher, training, held_out, settings, **options):
        made.update(training=training, held_out=held_out)
        return inner(model, teacher, training, held_out, settings, **options)

    def built(*args, **options):
        made["set"] = build(*args, **options)
        return made["set"]

    monkeypatch.setattr(stage, "recover", recover)
    monkeypatch.setattr(calibration_modifier, "build_calibration_set", built)
    monkeypatch.chdir(tmp_path)
    return made


def test_no_trace_is_trained_on_and_held_out_and_none_was_calibrated_on(prune, seen, tmp_path):
    """The pattern holds, and the weights moved."""
    model = prune(recover=RECOVER, output_dir=tmp_path / "out")
    names = ("training", "held_out")
    training, held_out = ({tuple(ids) for ids, _ in seen[name]} for name in names)
    calibrated = {tuple(s.ids) for s in seen["set"].loader.sequences}
    assert training
    assert held_out
    assert calibrated
    assert not training & held_out
    for ids in training | held_out:  # the last calibration sequence may be cut
        assert not any(ids[: len(other)] == other for other in calibrated)

    assert 400 < sum(len(ids) for ids, _ in seen["training"]) < 900
    record = record_of(tmp_path / "out")["recovery"]
    assert record["sequences"] == len(seen["training"])
    assert record["kl_after"] <= record["kl_before"]
    assert not (tmp_path / "rac_recovery").exists()
    for name, module in linears(model).items():
        groups = (module.weight == 0).reshape(module.weight.shape[0], -1, 4).sum(-1)
        assert bool((groups >= 2).all()), name


@pytest.mark.usefixtures("seen", "copies")
def test_recovery_trains_where_an_onloaded_weight_is_a_copy(prune, tmp_path):
    prune(recover=RECOVER, output_dir=tmp_path / "out")
    curve = record_of(tmp_path / "out")["recovery"]["curve"]
    assert len({kl for _, kl in curve}) == len(curve)


def test_too_little_memory_is_refused_before_anything_is_sampled(prune, tmp_path, monkeypatch):
    few = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=10**6))
    monkeypatch.setattr(memory, "psutil", few)
    store = {"store": str(tmp_path / "new.jsonl")}
    with pytest.raises(RacError, match=r"recover: training needs about .* 0\.0 GiB are free"):
        prune(recover=RECOVER, traces=store)
    assert not (tmp_path / "new.jsonl").exists()
