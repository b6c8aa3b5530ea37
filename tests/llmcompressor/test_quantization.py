"""Pruning and quantization, or quantization alone, in one pass: from the recipe to the
checkpoint."""

import pytest
import torch
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rac_modifier
from rac_modifier import ReasoningAwareSparseGPTModifier, cli
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.llmcompressor.quantizer import Quantizer
from rac_modifier.llmcompressor.run import Run
from tests.checkpoint.checkpoint_helpers import dense_tensors
from tests.llmcompressor.conftest import quantization_config, record_of
from tests.llmcompressor.modifier_helpers import INT8, assert_same_weights, int4, weights
from tests.llmcompressor.quantized_helpers import decoded
from tests.tiny import is_2of4, linears, recipe

SCHEMES = {  # and the format of the file
    "int4": (int4(), "pack-quantized"),
    "int8": (INT8, "pack-quantized"),
    "w8a8": ({"scheme": "W8A8"}, "int-quantized"),
    "fp8": ({"scheme": "FP8_DYNAMIC"}, "float-quantized"),
}
IDS = torch.arange(2, 60).unsqueeze(0)


def hidden(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, output_hidden_states=True).hidden_states[-1].float()


@pytest.mark.parametrize(
    ("scheme", "pattern"),
    [*((scheme, "2:4") for scheme in SCHEMES), ("int4", "0:0")],
)
def test_one_entry_prunes_and_quantizes_and_the_checkpoint_gives_the_same_model(
    prune, tmp_path, scheme, pattern
):
    out, settings = tmp_path / "out", {"mask_structure": pattern}
    if pattern == "0:0":
        settings["sparsity"] = 0.5
    model = prune(output_dir=out, quantization=SCHEMES[scheme][0], **settings)

    config, report = quantization_config(out), inspect_checkpoint(out)
    assert (config["format"], config["ignore"]) == (SCHEMES[scheme][1], ["lm_head"])
    packed = {"2:4": "sparse-24-bitmask"}.get(pattern, "sparse-bitmask")
    assert config["sparsity_config"]["format"] == packed
    assert report.sound
    assert len(report.sparse) == 14
    for row in report.sparse:
        assert row.sparsity >= 0.49
        assert row.structure == ("2:4" if pattern == "2:4" else "unstructured")
    assert [row.format for row in report.quantization] == [SCHEMES[scheme][1]]

    loaded = rac_modifier.load_model(out)
    assert_same_weights(weights(loaded), weights(model))  # after saving both are compressed
    assert torch.equal(hidden(loaded), hidden(model))
    for module in linears(loaded).values():  # the forward pass above decompressed it
        assert float((module.weight == 0).float().mean()) >= 0.49
        assert pattern != "2:4" or is_2of4(module.weight.float())

    assert not any("zero_point" in name for name in dense_tensors(out))
    record = record_of(out)
    assert len(record["quantization"]) == 1
    for module in record["modules"]:
        before, after = module["relative_error_before_rounding"], module["relative_error"]
        if scheme in ("int8", "w8a8"):  # costs next to nothing, and the sweeps refit further
            assert 0 < after == pytest.approx(before, rel=0.01)
        else:
            assert before < after < 1
        assert module["quantization"]
    assert "pruned and quantized" in (out / "README.md").read_text()
    ReasoningAwareSparseGPTModifier(**record["modifier"])  # the record can be run again


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_in_bfloat16_no_weight_is_rounded_anew_when_it_is_saved(
    prune, tmp_path, scheme, off_policy
):
    """Codes are read back from the stored tensors, in one shard or several, saved once or twice."""
    options = {"oneshot_options": {"precision": "bfloat16"}, "traces": off_policy}
    quantization = SCHEMES[scheme][0]
    model = prune(quantization=quantization, solver="sparsegpt", **options)
    before = {
        name: (module.weight.detach().clone(), module.weight_scale.detach().clone())
        for name, module in linears(model).items()
    }
    model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again", max_shard_size="5KB")
    for folder in ("out", "again"):
        loaded = rac_modifier.load_model(tmp_path / folder, dtype=torch.bfloat16)
        hidden(loaded)  # decompresses
        for name, module in linears(loaded).items():
            assert torch.equal(module.weight, before[name][0]), name
            assert torch.equal(module.weight_scale, before[name][1]), name


def test_the_command_line_quantizes_a_packed_model_as_it_is(pruned, tmp_path, off_policy):
    """In two steps: pruned and saved, loaded and quantized."""
    settings = {"mask_structure": "2:4", "solver": "keep", "quantization": int4()}
    settings |= {"traces": off_policy, "calibration": {"tokens": 400}}
    (tmp_path / "r.yaml").write_text(recipe(settings))
    command = ["prune", pruned.folder, tmp_path / "out", "-r", tmp_path / "r.yaml"]
    cli.app([str(part) for part in command], standalone_mode=False)
    report = inspect_checkpoint(tmp_path / "out")
    assert report.sound
    assert {row.dtype for row in report.sparse} == {"I4"}
    model = rac_modifier.load_model(tmp_path / "out")
    hidden(model)
    for name, module in linears(model).items():
        zero = pruned.model.get_submodule(name).weight == 0
        assert not module.weight[zero].any()
        assert module.weight[~zero].any()


# nothing is pruned


def alone(bits: int, symmetric: bool = True) -> dict:
    quantization = int4(bits, symmetric)
    return {"solver": "none", "mask_structure": None, "quantization": quantization}


@pytest.fixture
def evaluated(monkeypatch) -> dict[str, torch.Tensor]:
    """The weights that were evaluated, by name, once a model is saved."""
    seen: dict[str, torch.Tensor] = {}
    compress = Quantizer.compress

    def watched(self):
        pairs = zip(self.described, self.grids, strict=True)
        seen.update((name, module.weight.detach().clone()) for name, module in pairs)
        compress(self)

    monkeypatch.setattr(Quantizer, "compress", watched)
    return seen


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(2, True), (3, True), (8, True), (2, False), (4, False)]
)
def test_every_weight_gets_a_code_and_stock_transformers_reads_it(
    prune, dense, tmp_path, bits, symmetric, evaluated
):
    out = tmp_path / "out"
    model = prune(output_dir=out, **alone(bits, symmetric))
    config, report = quantization_config(out), inspect_checkpoint(out)
    assert (config["format"], config["ignore"]) == ("pack-quantized", ["lm_head"])
    assert config.get("sparsity_config") in (None, {})
    assert_same_weights(weights(AutoModelForCausalLM.from_pretrained(out)), weights(model))
    stored = decoded(out, bits)
    assert stored.keys() == linears(dense).keys()
    for name, (codes, values) in stored.items():
        assert codes.abs().max() <= 2 ** (bits - 1) * (1 if symmetric else 2)
        assert torch.equal(values.to(evaluated[name].dtype), evaluated[name]), name
        assert len(codes.unique()) > 2 ** (bits - 1), "most codes are used"
        original = dense.get_submodule(name).weight.float()
        both = torch.stack([values.flatten(), original.flatten()])
        assert torch.corrcoef(both)[0, 1] > {2: 0.7}.get(bits, 0.9), name
    assert report.sound
    assert not report.sparse
    record = record_of(out)
    assert record.keys().isdisjoint({"pattern", "mask_structure"})
    assert record["order"]["reconstruct"] == "dense"
    for module in record["modules"]:
        assert "sparsity" not in module
        assert 0 < module["relative_error"] < 1
    ReasoningAwareSparseGPTModifier(**record["modifier"])  # the record can be run again
    assert f"| Quantization | int{bits} " in (out / "README.md").read_text()
    assert torch.isfinite(hidden(rac_modifier.load_model(out))).all()


def test_closer_to_the_dense_model_than_upstreams_gptq_on_the_same_traces(prune, calibrate, dense):
    """Upstream rounds each layer towards its own outputs on the inputs of the model by then."""
    theirs = GPTQModifier(ignore=["lm_head"], **int4(3))
    target = hidden(dense)
    models = prune(**alone(3)), calibrate(later=[theirs])
    ours, other = (float((hidden(model) - target).square().sum()) for model in models)
    assert ours < 0.9 * other


def test_recovery_trains_every_weight_through_its_code(prune, tmp_path, monkeypatch, evaluated):
    zeros, kept, store, compress = {}, [], Run._store, Quantizer.compress

    def stored(self, module, result):
        zeros[module] = result.zero_point
        store(self, module, result)

    def compressed(self):
        kept.extend(torch.equal(m.weight_zero_point, zeros[m]) for m in self.grids)
        compress(self)

    monkeypatch.setattr(Run, "_store", stored)
    monkeypatch.setattr(Quantizer, "compress", compressed)
    recover = {"tokens": 4000, "passes": 4, "held_out_tokens": 600, "step_tokens": 200}
    recover |= {"learning_rate": 3e-4, "folder": str(tmp_path / "state")}
    prune(output_dir=tmp_path / "before", **alone(3, False))
    prune(output_dir=tmp_path / "after", recover=recover, **alone(3, False))
    record = record_of(tmp_path / "after")["recovery"]
    assert record["kl_after"] < 0.97 * record["kl_before"]
    before, after = (decoded(tmp_path / name, 3) for name in ("before", "after"))
    assert all(not torch.equal(before[name][0], after[name][0]) for name in before)
    assert all(torch.equal(values, evaluated[name].float()) for name, (_, values) in after.items())
    assert kept == [True] * 28  # the zero points of both runs


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4"])
def test_4_bit_floats_are_stored_as_they_were_chosen_and_trained(
    prune, dense, tmp_path, evaluated, off_policy, name
):
    """In upstream's layout: stock transformers reads each weight that was measured."""
    settings = {"solver": "none", "mask_structure": None, "traces": off_policy}
    settings["quantization"] = {"scheme": f"{name}A16"}
    recover = {"tokens": 4000, "passes": 4, "held_out_tokens": 600, "step_tokens": 200}
    recover |= {"learning_rate": 1e-4, "folder": str(tmp_path / "state")}
    for folder, more in (("before", {}), ("after", {"recover": recover})):
        out = tmp_path / folder
        prune(output_dir=out, oneshot_options={"precision": "bfloat16"}, **settings, **more)
        config = quantization_config(out)
        assert (config["format"], config["ignore"]) == (
            f"{name.lower()}-pack-quantized",
            ["lm_head"],
        )
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
        hidden(loaded)  # decompresses
        stored = decoded(out, 4)
        assert stored.keys() == linears(dense).keys() == evaluated.keys()
        for module, (codes, values) in stored.items():
            assert len(codes.unique()) == 15
            assert torch.equal(values.bfloat16(), evaluated[module]), module
            assert torch.equal(loaded.get_submodule(module).weight, evaluated[module]), module
            original = dense.get_submodule(module).weight.float()
            assert torch.corrcoef(torch.stack([values.flatten(), original.flatten()]))[0, 1] > 0.95
        together: dict[float, str] = {}  # the first letters of modules with the same global scale
        for key, value in sorted(load_file(out / "model.safetensors").items()):
            if key.endswith("weight_global_scale"):
                together[float(value)] = together.get(float(value), "") + key.split(".")[-2][0]
        shared = sorted(["kqv", "o", "gu", "d"] * 2)  # a server multiplies these in one call
        assert sorted(together.values()) == (shared if name == "NVFP4" else [])
    record = record_of(tmp_path / "after")["recovery"]
    assert record["kl_after"] < record["kl_before"]
    assert inspect_checkpoint(tmp_path / "after").sound
