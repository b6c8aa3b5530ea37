"""The shipped recipes, each run as it is on a tiny model, where it needs no download."""

from pathlib import Path

import pytest
import torch
import yaml
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.checkpoint.hf_quantizer import load_model
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.settings.recipe import CheckedRecipe
from tests.tiny import is_2of4, linears, save_tiny, save_tiny_experts

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL = ["calibration.tokens=400"]
SMALL += ["traces.sampling.max_new_tokens=20", "traces.sampling.temperature=1.0"]
SMALL_RECOVERY = ["recover.tokens=2000", "recover.held_out_tokens=400"]


def is_offline(path: Path) -> bool:
    _, entry = CheckedRecipe.read(path).entry
    problems = entry["traces"]["problems"]
    return problems["source"] == "arithmetic" or problems["source"].startswith("reasoning-gym:")


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory):
    """A tiny model whose inputs are multiples of 128, the group size of W4A16."""
    wide = {"hidden_size": 128, "intermediate_size": 256}
    wide |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    return save_tiny(tmp_path_factory.mktemp("wide") / "model", **wide)


def test_some_recipes_need_no_download():
    assert sum(map(is_offline, RECIPES)) >= 3


def test_a_recipe_is_named_by_its_path_in_a_clone(wide_folder, tmp_path, monkeypatch):
    """The call of README, with budgets that a test can wait for."""
    prepare = ReasoningAwareSparseGPTModifier.prepare

    def prepare_less(self, state):
        few = {"max_new_tokens": 20, "temperature": 1.0}
        sampling = self.traces.sampling.model_copy(update=few)
        update = {"store": str(tmp_path / "own.jsonl"), "sampling": sampling}
        self.traces = self.traces.model_copy(update=update)
        self.calibration = self.calibration.model_copy(update={"tokens": 400})
        prepare(self, state)

    monkeypatch.setattr(ReasoningAwareSparseGPTModifier, "prepare", prepare_less)
    monkeypatch.chdir(RECIPES[0].parents[1])
    model = AutoModelForCausalLM.from_pretrained(wide_folder)
    oneshot(model, recipe="recipes/rac_2of4.yaml")
    assert len(linears(model)) == 14
    assert all(is_2of4(module.weight) for module in linears(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in RECIPES if is_offline(p)], ids=lambda p: p.stem)
def test_a_shipped_recipe_runs_without_download(path, wide_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where relative stores go
    content = CheckedRecipe.load(path, SMALL + SMALL_RECOVERY * ("recover" in path.stem)).content
    for stage in content.values():
        for modifiers in stage.values():
            if "AutoRoundModifier" in modifiers:
                modifiers["AutoRoundModifier"]["iters"] = 2
    out = tmp_path / "out"
    reap = "reap" in path.stem
    model = oneshot(
        model=str(save_tiny_experts(tmp_path / "experts") if reap else wide_folder),
        recipe=yaml.safe_dump(content, sort_keys=False),
        output_dir=str(out),
        precision="bfloat16" if "nvfp4" in path.stem else "auto",
    )
    report = inspect_checkpoint(out)
    assert report.sound
    described = "".join(scheme.describe() for scheme in report.quantization)
    named = path.stem.replace("kv_fp8", "") + "_w8" * (path.stem == "rac_w4a16")  # its head
    for scheme, kind in {"fp8": "float8", "w8": "int8", "w4a16": "int4"}.items():
        assert (scheme in named) == (kind in described)
    pruned = path.stem.startswith(("rac_2of4", "rac_unstructured"))
    assert len(report.sparse) == (14 if pruned else 0)
    assert all(
        row.sparsity == pytest.approx(0.6 if "_60" in path.stem else 0.5, abs=0.05)
        for row in report.sparse
    )  # small weights round to 0 as well
    structure = "2:4" if "2of4" in path.stem else "unstructured"
    assert all(row.structure == structure for row in report.sparse)
    loaded = load_model(out)
    ids = torch.arange(2, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    for name, module in linears(loaded).items():  # the forward pass decompressed them
        assert not pruned or "2of4" not in path.stem or is_2of4(module.weight), name
