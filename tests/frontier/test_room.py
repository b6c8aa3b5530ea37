import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rac_modifier.errors import RacError
from rac_modifier.frontier.compressing import Group
from rac_modifier.frontier.estimate import Asked, ModelShape, Plan
from rac_modifier.frontier.room import Room, check_room, needs

GIB = 2**30
SHAPE = ModelShape(
    parameters=GIB // 2,
    groups=(Group(10, (20,)), Group(30, (10,))),
    layers=3,
    hidden=10,
    kv_bytes=1000,
)
SERVED = Asked("served", answers=8, cap=100_000, at_once=64, served=True)
HERE = Asked("here", answers=6, cap=50_000, at_once=4, served=False)
PLAN = Plan(SHAPE, rows=3, tokens=700, traces=SERVED, asked=(SERVED, HERE), served=True)
ENOUGH = Room(device=10 * GIB, host=10 * GIB, disk=10 * GIB)


def found(plan=PLAN, keep_models=True):
    return {need.where: need.nbytes for need in needs(plan, keep_models=keep_models)}


def test_what_is_needed_where():
    model = GIB
    assert (
        found()["device"] == 2 * model + 4 * 50_000 * 1000
    )  # a server has one model, and its longest answer
    assert found()["host"] == 2 * model + 2 * 700 * (30 + 10) * 2
    answers = 4 * (8 * 100_000 + 6 * 50_000) * 8
    assert found()["disk"] == (3 + 1) * model + answers
    assert found(keep_models=False)["disk"] == (1 + 1) * model + answers
    long = replace(SERVED, cap=10_000_000)
    assert found(replace(PLAN, asked=(long,)))["device"] == model + 10_000_000 * 1000


def test_a_run_that_fits():
    lines = check_room(needs(PLAN, keep_models=True), ENOUGH)
    assert len(lines) == 3
    assert (
        lines[0]
        == "device: 2.19 GiB are needed for two models and a batch of answers, 10.00 GiB are free"
    )


def test_all_that_does_not_fit_is_in_one_message():
    with pytest.raises(RacError) as refused:
        check_room(needs(PLAN, keep_models=True), Room(device=2 * GIB, host=10 * GIB, disk=GIB))
    first, device, disk = str(refused.value).splitlines()
    assert first == "nothing was started, because this does not fit:"
    assert device.startswith("- device: 2.19 GiB are needed")
    assert device.endswith(
        "2.00 GiB are free; lower evaluation.batch_size or evaluation.cap in the grid"
    )
    assert disk.endswith("1.00 GiB are free; free some, or use --remove-models")


def test_without_an_accelerator_the_host_holds_the_models():
    lines = check_room(needs(PLAN, keep_models=True), replace(ENOUGH, device=None))
    assert lines[0].startswith("host: 2.19 GiB are needed for two models")
    with pytest.raises(RacError, match=r"- host: 2\.19 GiB are needed for two models"):
        check_room(needs(PLAN, keep_models=True), Room(device=None, host=GIB, disk=10 * GIB))


def test_what_is_written_already_counts_as_room(tmp_path, monkeypatch):
    def disk_usage(place):  # a disk on which nothing but this test writes
        assert place in (tmp_path, tmp_path / "out")
        return SimpleNamespace(
            free=10**9 - sum(path.stat().st_size for path in tmp_path.rglob("model"))
        )

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    before = Room.here(tmp_path / "out" / "deeper")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model").write_bytes(b"x" * 50_000)
    after = Room.here(tmp_path / "out")
    assert (before.disk, after.disk) == (10**9, 10**9)
    assert after.host > 0
