"""The text that is logged at load."""

from __future__ import annotations

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm

needs_vllm()

from rac_modifier.kernels.interface import Decision, stay_dense  # noqa: E402
from rac_modifier.vllm_plugin import load_report  # noqa: E402
from rac_modifier.vllm_plugin.load_report import LoadReport  # noqa: E402


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Level and text of what is logged."""
    lines: list[tuple[str, str]] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            load_report.logger,
            level,
            lambda text, *args, level=level: lines.append((level, text % args)),
        )
    return lines


def test_it_comes_with_the_last_layer_and_has_every_decision(logged):
    report = LoadReport()
    for _ in range(4):
        report.expect()
    report.leave("e", "its weights are int8")
    report.add("a", Decision(True, "sparse kernel avx2", "", 1.1, 1.98))
    report.add("b", Decision(True, "sparse kernel avx2", "", 1.3, 1.95))
    report.add("c", None)  # not compressed
    assert logged == []
    report.add("d", stay_dense("it is small", torch.bfloat16))
    ((level, text),) = logged
    assert level == "info"
    assert text.splitlines() == [
        "rac: 2 of 4 compressed layers run on a kernel",
        "  sparse kernel avx2: 2 layers, 1.10-1.30 bytes per weight, at most 1.80x faster",
        "  vLLM's own method because its weights are int8: 1 layer, such as e",
        "  dense because it is small: 1 layer, such as d",
    ]


@pytest.mark.parametrize("requested", [True, False])
def test_layers_of_one_decision_share_a_line_and_a_request_without_effect_is_a_warning(
    logged, requested
):
    report = LoadReport(requested, expected=2)
    report.add("a", stay_dense("it is small", torch.bfloat16))
    report.add("b", stay_dense("it is small", torch.bfloat16))
    ((level, text),) = logged
    assert text.splitlines()[1] == "  dense because it is small: 2 layers, such as a"
    assert level == ("warning" if requested else "info")
    assert ("--quantization rac has no effect on this model here" in text) == requested
