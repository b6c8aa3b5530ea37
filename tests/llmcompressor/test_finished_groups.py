"""A run that is killed goes on after the last groups that it wrote, and ends with the weights of an undisturbed run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from rac_modifier import RacError
from rac_modifier.llmcompressor import finished_groups
from rac_modifier.llmcompressor.finished_groups import FinishedGroups
from tests import forked
from tests.llmcompressor import killed_runs
from tests.llmcompressor.unfinished_runs import GROUPS, RECOVERED, Killed, modules, result, written
from tests.tiny import entry, recipe

SETTINGS = {
    "dense target": {},
    "int4": {
        "quantization": {
            "config_groups": {
                "all": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
            }
        }
    },
    "layer by layer": {"preset": "paper"},
    "recovered int8": RECOVERED,
}


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_goes_on_where_it_was_killed(prune, solved, tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    prune(output_dir=tmp_path / "undisturbed", **settings)
    assert len(solved) == GROUPS
    assert not (tmp_path / "undisturbed.unfinished").exists()
    expected = list(solved)
    solved.clear()
    solved.lives = 5
    with pytest.raises(Killed):
        prune(output_dir=tmp_path / "killed", **settings)
    solved.lives = 10**6
    prune(output_dir=tmp_path / "killed", **settings)
    whole = 4 if "preset" in settings else 5  # layer by layer, only a whole layer counts
    assert solved == expected[:5] + expected[whole:]
    assert result(tmp_path / "killed") == result(tmp_path / "undisturbed")
    assert list(tmp_path.glob("killed.unfinished*")) == []


def test_groups_are_written_now_and_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(finished_groups.time, "monotonic", lambda: now[0])
    groups = FinishedGroups(tmp_path / "state", {})
    groups.begin({})
    for number, module in enumerate(modules()):
        now[0] += 16.0
        groups.add({str(number): module}, {str(number): {"error": number}}, {})
    held = sorted((tmp_path / "state").glob("*.safetensors"))
    assert [sorted(load_file(file)) for file in held] == [
        ["0.weight", "1.weight"],
        ["2.weight", "3.weight"],
    ]
    again = FinishedGroups(tmp_path / "state", {})
    assert not again.has(["0"])
    again.begin({})
    assert again.has(["0", "3"])
    assert not again.has(["3", "4"])
    module = torch.nn.Linear(3, 2, bias=False)
    masters: dict[str, torch.Tensor] = {}
    assert again.restore("2", module, masters) == {"error": 2}
    assert not masters
    assert torch.equal(module.weight, modules()[2].weight)


@pytest.mark.usefixtures("at_once")
def test_no_file_is_overwritten_where_others_are_missing(tmp_path):
    folder = tmp_path / "state"
    groups = FinishedGroups(folder, {})
    groups.begin({})
    for number, module in enumerate(modules()[:3]):
        groups.add({str(number): module}, {str(number): {}}, {})
    (folder / "group-00000.safetensors").unlink()
    again = FinishedGroups(folder, {})
    again.begin({})
    again.add({"3": modules()[3]}, {"3": {}}, {})
    last = FinishedGroups(folder, {})
    last.begin({})
    assert [last.has([str(number)]) for number in range(4)] == [False, True, True, True]


@pytest.mark.usefixtures("at_once")
def test_a_damaged_file_is_named(tmp_path):
    file = written(tmp_path / "state", {})
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    with pytest.raises(
        RacError, match=r"group-00000\.safetensors: cannot be read .*remove .*state to start anew"
    ):
        FinishedGroups(tmp_path / "state", {}).begin({"calibration set": "a"})
    file.write_bytes(whole)
    groups = FinishedGroups(tmp_path / "state", {})
    groups.begin({"calibration set": "a"})
    with pytest.raises(RacError, match=r"m\.weight has the shape \(2, 3\)"):
        groups.restore("m", torch.nn.Linear(4, 2), {})


@pytest.mark.slow
def test_twenty_kills_change_nothing(tiny_folder, trace_store, tmp_path):
    """SIGKILL at random times, also while a group is being written; every start is a process of its own."""
    (tmp_path / "recipe.yaml").write_text(recipe(entry(trace_store)))
    ran = forked.run(killed_runs.main, [str(tiny_folder), "recipe.yaml", "20"], tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["kills"] == 20
    assert found["resumed"] >= 5, (
        "hardly any start found groups of an earlier one: the test shows nothing"
    )
    assert result(tmp_path / "killed") == result(tmp_path / "undisturbed")
    assert list(tmp_path.glob("killed.unfinished*")) == []
