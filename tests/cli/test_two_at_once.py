"""Two commands with one output folder: the second is refused at once, and the first ends."""

from functools import partial
from pkgutil import resolve_name

import pytest

from tests.cli.conftest import OPTIONS

# The work of each command, which a command that is refused never reaches.
WORK = {
    "prune": "llmcompressor.oneshot",
    "recover": "rac_modifier.recovery.checkpoint.recover_checkpoint",
    "pack": "rac_modifier.checkpoint.pack_plan.plan_packing",
    "unpack": "rac_modifier.checkpoint.packing.unpack_model",
}


@pytest.fixture
def commands(rac, tiny_folder, sparse_folder, recipe_file) -> dict[str, list]:
    rac.output("unpack", sparse_folder, "dense")
    words = ["-r", recipe_file, "-s", "calibration.tokens=500"]
    return {
        "prune": ["prune", tiny_folder, "a/out", *words],
        "recover": ["recover", tiny_folder, sparse_folder, "a/out", *OPTIONS],
        "pack": ["pack", "dense", "a/out"],
        "unpack": ["unpack", sparse_folder, "a/out"],
    }


@pytest.mark.parametrize("first", WORK)
def test_the_second_is_refused_and_the_first_is_not_harmed(
    rac, commands, tmp_path, monkeypatch, first
):
    refused = []

    def meet(work, *given, **options):
        assert not refused, "a refused command began to work"
        for second in commands.values():
            refused.append(rac(*second))
        return work(*given, **options)

    for path in WORK.values():
        monkeypatch.setattr(path, partial(meet, resolve_name(path)))
    code, _, said = rac(*commands[first])
    assert code == 0, said
    assert [code for code, *_ in refused] == [1] * 4
    assert all("a/out.unfinished is in use by process" in said for *_, said in refused), refused
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    names = {path.name for path in (tmp_path / "a" / "out").iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= names


@pytest.mark.parametrize("command", WORK)
def test_a_command_that_is_interrupted_leaves_no_lock(
    rac, commands, tmp_path, monkeypatch, command
):
    def interrupt(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(WORK[command], interrupt)
    assert rac(*commands[command])[0] == 130
    assert not (tmp_path / "a").exists()
