"""`solver: none`: nothing is pruned, and the modules are rounded towards the dense model's outputs."""

import json

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import rac_modifier
from rac_modifier import (
    RacError,
    ReasoningAwareCalibrationModifier,
    ReasoningAwareSparseGPTModifier,
)
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.llmcompressor.quantizer import GroupQuantizer
from tests.llmcompressor.modifier_helpers import assert_same_weights, weights
from tests.llmcompressor.quantized_helpers import decoded
from tests.tiny import calibration_entry, linears

IDS = torch.arange(2, 60).unsqueeze(0)


def scheme(bits: int, symmetric: bool = True, **more) -> dict:
    weights = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": symmetric}
    return {"config_groups": {"w": {"targets": ["Linear"], "weights": weights, **more}}}


def alone(bits: int, symmetric: bool = True, **more) -> dict:
    return {
        "solver": "none",
        "mask_structure": None,
        "quantization": scheme(bits, symmetric, **more),
    }


def hidden(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, output_hidden_states=True).hidden_states[-1].float()


@pytest.fixture
def evaluated(monkeypatch) -> dict[str, torch.Tensor]:
    """The weights that were evaluated, by name, once a model is saved."""
    seen: dict[str, torch.Tensor] = {}
    compress = GroupQuantizer.compress

    def watched(self):
        seen.update(
            (n, m.weight.detach().clone()) for n, m in zip(self.described, self.grids, strict=True)
        )
        compress(self)

    monkeypatch.setattr(GroupQuantizer, "compress", watched)
    return seen


@pytest.fixture
def zero_points(evaluated, monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The zero points of each module when it was rounded, and when it is saved."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    found: dict[torch.nn.Module, torch.Tensor] = {}
    store, compress = GroupQuantizer.store, GroupQuantizer.compress

    def stored(self, module, weight, scale, zero_point=None):
        if zero_point is not None:
            found[module] = zero_point.clone()
        store(self, module, weight, scale, zero_point)

    def compressed(self):
        pairs.extend(
            (found[m], m.weight_zero_point.detach().clone()) for m in self.grids if m in found
        )
        compress(self)

    monkeypatch.setattr(GroupQuantizer, "store", stored)
    monkeypatch.setattr(GroupQuantizer, "compress", compressed)
    return pairs


@pytest.mark.parametrize(
    ("bits", "symmetric"),
    [(2, True), (3, True), (4, True), (8, True), (2, False), (3, False), (4, False)],
)
def test_every_weight_gets_a_code_and_stock_transformers_reads_it(
    prune, tmp_path, bits, symmetric, tiny_folder, evaluated
):
    out = tmp_path / "out"
    model = prune(output_dir=out, **alone(bits, symmetric))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["format"], config["ignore"]) == ("pack-quantized", ["lm_head"])
    assert config.get("sparsity_config") in (None, {})
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert_same_weights(weights(loaded), weights(model))
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder)
    stored = decoded(out, bits)
    assert stored.keys() == linears(dense).keys()
    for name, (codes, values) in stored.items():
        assert codes.abs().max() <= 2 ** (bits - 1) * (1 if symmetric else 2)
        assert torch.equal(values.to(evaluated[name].dtype), evaluated[name]), (
            "the file holds what was evaluated"
        )
        assert len(codes.unique()) > 2 ** (bits - 1), "most codes are used"
        original = linears(dense)[name].weight.float()
        assert torch.corrcoef(torch.stack([values.flatten(), original.flatten()]))[0, 1] > {
            2: 0.7
        }.get(bits, 0.9), name
    report = inspect_checkpoint(out)
    assert report.sound
    assert not report.sparse


def test_the_record_and_the_card_speak_of_no_pattern(prune, tmp_path):
    prune(output_dir=tmp_path / "out", **alone(4))
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert "pattern" not in record
    assert "mask_structure" not in record
    assert record["order"]["reconstruct"] == "dense"
    assert len(record["modules"]) == 14
    for module in record["modules"]:
        assert "sparsity" not in module
        assert 0 < module["relative_error"] < 1
    ReasoningAwareSparseGPTModifier(**record["modifier"])  # the record can be run again
    card = (tmp_path / "out" / "README.md").read_text()
    assert "14 linear modules were quantized (errors are after rounding)." in card
    assert "pruned" not in card
    assert "Pattern" not in card


def test_closer_to_the_dense_model_than_upstreams_gptq_on_the_same_traces(
    prune, dense, tiny_folder, trace_store
):
    """Upstream rounds each layer towards its own outputs on the inputs of the model as it is by then."""
    ours = prune(**alone(3))
    calibration = ReasoningAwareCalibrationModifier(**calibration_entry(trace_store))
    gptq = GPTQModifier(ignore=["lm_head"], **scheme(3))
    theirs = oneshot(model=str(tiny_folder), recipe=[calibration, gptq])
    wanted = hidden(dense)
    mine, other = (float((hidden(model) - wanted).square().sum()) for model in (ours, theirs))
    assert mine < 0.9 * other


def test_what_no_scheme_matches_stays_as_it_is(prune, dense):
    model = prune(**alone(4, targets=["re:.*mlp.*"]))
    for name, module in linears(model).items():
        same = torch.equal(module.weight, linears(dense)[name].weight)
        assert same == (".mlp." not in name), name


@pytest.mark.parametrize("symmetric", [True, False])
def test_recovery_trains_every_weight_through_its_code(
    prune, tmp_path, symmetric, evaluated, zero_points
):
    recover = {
        "tokens": 4000,
        "passes": 4,
        "held_out_tokens": 600,
        "step_tokens": 200,
        "learning_rate": 3e-4,
    }
    prune(output_dir=tmp_path / "before", **alone(3, symmetric))
    zero_points.clear()
    prune(
        output_dir=tmp_path / "after",
        recover={**recover, "folder": str(tmp_path / "state")},
        **alone(3, symmetric),
    )
    record = json.loads((tmp_path / "after" / "rac_run.json").read_text())
    assert record["recovery"]["kl_after"] < 0.97 * record["recovery"]["kl_before"]
    before, after = (decoded(tmp_path / name, 3) for name in ("before", "after"))
    assert all(not torch.equal(before[name][0], after[name][0]) for name in before), (
        "codes of every module have moved"
    )
    assert all(torch.equal(values, evaluated[name].float()) for name, (_, values) in after.items())
    assert len(zero_points) == (0 if symmetric else 14)
    assert all(torch.equal(before, after) for before, after in zero_points), (
        "zero points stay as they were"
    )


def test_three_bits_are_refused_where_weights_are_pruned_since_they_cannot_be_stored_sparse(prune):
    with pytest.raises(
        RacError,
        match="int of 3 bits, strategy group cannot be rounded here; use int of 4 or 8 bits",
    ):
        prune(quantization=scheme(3))


def test_nothing_to_do_is_refused():
    with pytest.raises(
        ValidationError,
        match="solver: none prunes nothing, and without quantization nothing is left to do",
    ):
        ReasoningAwareSparseGPTModifier(solver="none")


def test_a_packed_model_of_ours_loads_it_too(prune, tmp_path):
    prune(output_dir=tmp_path / "out", **alone(4))
    model = rac_modifier.load_model(tmp_path / "out")
    assert torch.isfinite(hidden(model)).all()
