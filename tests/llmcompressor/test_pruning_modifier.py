"""The pruning entry: what is refused before sampling, what is recorded."""

import pytest
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

from rac_modifier import RacError, ReasoningAwareSparseGPTModifier
from tests.llmcompressor.modifier_helpers import gptq_w4
from tests.tiny import TOKENS, entry, linears


class Sampling(Exception):  # noqa: N818 - not an error
    """Sampling has begun: nothing was refused."""


@pytest.fixture
def refused_or_sampled(tiny_folder, trace_store, monkeypatch):
    """Run a recipe of modifiers around ours up to where it would sample."""

    def sample(*args, **kwargs):
        raise Sampling

    monkeypatch.setattr(
        "rac_modifier.llmcompressor.calibration_modifier.build_calibration_set", sample
    )

    def run(*before, later=(), **settings):
        ours = ReasoningAwareSparseGPTModifier(**entry(trace_store, **settings))
        oneshot(model=str(tiny_folder), recipe=[*before, ours, *later])

    return run


def fp8() -> QuantizationModifier:
    return QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="FP8_DYNAMIC")


@pytest.mark.parametrize("later", [[gptq_w4], [gptq_w4, fp8], [fp8, gptq_w4]])
def test_gptq_anywhere_behind_ours_is_refused(refused_or_sampled, later):
    with pytest.raises(
        RacError, match=r"GPTQModifier after .* fills pruned weights again; .*quantization: {scheme"
    ):
        refused_or_sampled(later=[make() for make in later])


def test_gptq_between_another_modifier_and_ours_is_refused_only_behind(refused_or_sampled):
    with pytest.raises(RacError, match="GPTQModifier after"):
        refused_or_sampled(fp8(), later=[gptq_w4()])


@pytest.mark.parametrize("before", [[gptq_w4], [fp8, gptq_w4]])
def test_gptq_in_front_of_ours_is_not_refused(refused_or_sampled, before):
    with pytest.raises(Sampling):
        refused_or_sampled(*[make() for make in before])


def test_quantizing_twice_is_refused(refused_or_sampled):
    with pytest.raises(RacError, match=r"QuantizationModifier after .* would quantize twice"):
        refused_or_sampled(later=[fp8()], quantization={"scheme": "W8A16"})
    with pytest.raises(Sampling):
        refused_or_sampled(later=[fp8()])


def test_keep_refuses_a_model_without_the_zeros(prune):
    with pytest.raises(RacError, match="solver: keep keeps the zeros that a model has"):
        prune(solver="keep")


def test_every_module_has_a_row_in_the_record(prune, record_of, dense):
    record = record_of(prune)
    assert record["method"] == "alps"
    assert record["order"] == {"order": "group", "why": "order: auto", "reconstruct": "dense"}
    assert {row["name"] for row in record["modules"]} == set(linears(dense))
    for row in record["modules"]:
        assert row["tokens"] == TOKENS
        assert row["sparsity"] == pytest.approx(0.5, abs=0.01)
        assert 0 < row["relative_error"] < 1
