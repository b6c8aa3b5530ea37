"""Two processes with gloo against one: the same weights, the same divergence, each process half of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rac_modifier.processes import Processes
from tests.recovery import sharded_run
from tests.recovery.recovery_helpers import dense_and_sparse
from tests.recovery.sharded_run import NAME, run
from tests.started import started_forks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    ends = started_forks(sharded_run.main, [str(folder)], folder)
    assert [code for code, _ in ends] == [0, 0], ends
    return folder


@pytest.mark.parametrize("kind", ["plain", "recomputed", "quantized"])
def test_two_processes_end_as_one(folder, kind):
    found = load_file(folder / f"{kind}.safetensors")
    result, model = run(kind, Processes())
    curve = torch.tensor([kl for _, kl in result.curve], dtype=torch.float64)
    assert result.kl_after < result.kl_before
    if kind == "quantized":  # a sum in another order may round to another code
        torch.testing.assert_close(found.pop("curve"), curve, rtol=5e-3, atol=0)
    else:
        torch.testing.assert_close(found.pop("curve"), curve, rtol=1e-4, atol=0)
    zeros = {
        name
        for name, linear in model.named_modules()
        if isinstance(linear, torch.nn.Linear) and name != "lm_head"
    }
    start = dense_and_sparse()[1].state_dict()
    for name, weight in model.state_dict().items():
        if kind != "quantized":  # of steps of up to 3e-3
            torch.testing.assert_close(found[name], weight, rtol=0, atol=3e-4)
        if name.removesuffix(".weight") in zeros:
            assert not bool(found[name][start[name] == 0].any()), name
    assert not torch.equal(found[f"{NAME}.weight"], start[f"{NAME}.weight"])


def test_each_process_holds_half_and_a_killed_run_goes_on(folder):
    ends = [load_file(folder / f"killed-{rank}.safetensors") for rank in range(2)]
    trained = sum(
        p.numel()
        for n, p in dense_and_sparse()[1].named_parameters()
        if "embed" not in n and "lm_head" not in n
    )
    held = [end["held"].unique().tolist() for end in ends]
    assert all(len(counts) == 1 for counts in held)
    assert sum(counts[0] for counts in held) == trained
    assert abs(held[0][0] - held[1][0]) < 0.01 * trained
    steps = run("plain", Processes())[0].steps
    assert [int(end["steps"]) for end in ends] == [
        steps - 2,
        steps - 2,
    ]  # two were done when it was killed
    plain = load_file(folder / "plain.safetensors")
    assert all(torch.equal(end["weight"], plain[f"{NAME}.weight"]) for end in ends)


def test_a_run_of_two_processes_goes_on_in_one(folder):
    """Here it has ended, so that nothing is left to train."""
    result, model = run("plain", Processes(), folder / "state")
    plain = load_file(folder / "plain.safetensors")
    assert [kl for _, kl in result.curve] == plain["curve"].tolist()
    assert torch.equal(model.get_parameter(f"{NAME}.weight"), plain[f"{NAME}.weight"])
