"""A run that does not fit is refused by name; one that fits with activations computed twice runs so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rac_modifier import RacError
from rac_modifier.llmcompressor.group_shape import GroupShape
from rac_modifier.llmcompressor.memory_check import check_memory
from tests.llmcompressor.test_memory import CPU, OTHER, need


def test_too_little_memory_is_an_error_that_names_module_bytes_and_next_step():
    groups = [GroupShape("small", 32, 32), GroupShape("layers.3.down", 256, 64)]
    bytes_needed = need().bytes_on(CPU, CPU, CPU, groups[1])
    check_memory(need(), groups, CPU, CPU, free=lambda device: bytes_needed)
    with pytest.raises(RacError) as caught:
        check_memory(need(), groups, CPU, CPU, free=lambda device: bytes_needed - 1)
    message = str(caught.value)
    assert "layers.3.down" in message
    assert f"({bytes_needed:,} bytes)" in message
    assert f"({bytes_needed - 1:,} bytes) are free" in message
    assert "calibration.tokens" in message
    assert "preset: paper" in message
    assert "reconstruct: pruned" not in message  # it is already


@pytest.mark.parametrize(
    ("solver", "doing"), [("none", "quantizing"), ("alps", "pruning"), ("keep", "pruning")]
)
def test_a_run_that_only_quantizes_is_not_said_to_prune(solver, doing):
    with pytest.raises(RacError, match=f"^{doing} down is predicted to need"):
        check_memory(
            need(solver=solver), [GroupShape("down", 256, 64)], CPU, CPU, free=lambda device: 1
        )


def test_activations_and_solver_are_checked_on_their_own_devices():
    group = GroupShape("down", 256, 64)
    free = {CPU: need().kept(group), OTHER: need().work(group, OTHER)}
    check_memory(need(), [group], OTHER, CPU, free=free.get)
    with pytest.raises(RacError, match="on cpu"):
        check_memory(need(), [group], OTHER, CPU, free={**free, CPU: free[CPU] - 1}.get)
    with pytest.raises(RacError, match="on meta"):
        check_memory(need(), [group], OTHER, CPU, free={**free, OTHER: free[OTHER] - 1}.get)


def test_a_device_whose_free_memory_is_not_known_is_not_checked():
    check_memory(need(), [GroupShape("down", 256, 64)], OTHER, OTHER)


def test_a_run_is_refused_before_anything_is_sampled(prune, monkeypatch):
    monkeypatch.setattr(
        "rac_modifier.llmcompressor.calibrating_modifier.build_calibration_set", None
    )
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(
        RacError,
        match=r"down_proj is predicted to need .* on cpu .* are free: .*calibration\.tokens",
    ):
        prune()


def test_padding_is_counted_once_the_calibration_set_is_there(prune, monkeypatch):
    """Two checks: with the budget before sampling, with padded batches and the traced groups before pruning."""
    seen = []
    monkeypatch.setattr(
        "rac_modifier.llmcompressor.pruning_modifier.check_memory",
        lambda need, groups, onload, offload, **_: seen.append((need, groups)) or need,
    )
    prune(calibration={"tokens": 1500, "batch_tokens": 512})
    (before, modules), (after, groups) = seen
    assert (before.tokens, before.batch_tokens) == (1500, 512)
    assert after.tokens > 1500
    assert after.batch_tokens <= 512
    assert len(modules) == 14
    assert [group.rows for group in groups[:4]] == [128, 64, 256, 64]


def test_wide_inputs_that_do_not_fit_are_computed_twice_where_that_fits():
    gate, down = GroupShape("gate", 64, 100), GroupShape("down", 256, 64)
    groups = [replace(gate, after=down), replace(down, before=gate)]
    run = need(tokens=10_000)
    twice = replace(run, twice_before=256)
    most, least = (
        max(one.bytes_on(CPU, CPU, CPU, group) for group in groups) for one in (run, twice)
    )
    assert least < most - 0.9 * 10_000 * (256 - 64) * 2
    assert check_memory(run, groups, CPU, CPU, free=lambda device: most) == run
    assert check_memory(run, groups, CPU, CPU, free=lambda device: most - 1) == twice
    assert check_memory(run, groups, CPU, CPU, free=lambda device: 2 * least, processes=2) == twice
    with pytest.raises(RacError, match=rf"down is predicted to need .*\({least:,} bytes\)"):
        check_memory(run, groups, CPU, CPU, free=lambda device: least - 1)
    nothing_wider = [replace(gate, after=gate), replace(gate, before=gate)]
    with pytest.raises(RacError, match="gate is predicted"):
        check_memory(run, nothing_wider, CPU, CPU, free=lambda device: 1)


def test_a_gpu_that_is_too_small_does_not_make_the_host_compute_twice():
    gate, down = GroupShape("gate", 64, 100), GroupShape("down", 256, 64)
    groups = [replace(gate, after=down), replace(down, before=gate)]
    with pytest.raises(RacError, match="on meta"):
        check_memory(need(), groups, OTHER, CPU, free={CPU: 10**12, OTHER: 1}.get)
