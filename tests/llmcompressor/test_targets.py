"""Which modules are pruned, and which pattern each gets."""

import pytest
import torch
from llmcompressor import oneshot

import rac_modifier
from rac_modifier import RacError, ReasoningAwareSparseGPTModifier
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.llmcompressor.targets import find_targets
from rac_modifier.settings.pattern import Pattern
from tests.llmcompressor.conftest import record_of
from tests.llmcompressor.modifier_helpers import assert_same_weights, weights
from tests.tiny import entry, is_2of4, linears, save_tiny, tiny_gemma, tiny_model

TWO_OF_FOUR = Pattern.n_of_m(2, 4)


def test_targets_and_ignore_are_llm_compressors_and_a_head_has_to_be_named(prune):
    """By class, name or pattern; the head is pruned where its exact name is given."""
    targets, ignore = ["lm_head", "re:.*mlp.*"], ["re:.*layers.1.*"]
    model = prune(targets=targets, ignore=ignore, solver="magnitude", reconstruct="pruned")
    every = linears(model) | {"lm_head": model.lm_head}
    assert {n for n, m in every.items() if is_2of4(m.weight)} == {"lm_head"} | {
        f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert "lm_head" not in find_targets(tiny_model(), ["Linear"], [], TWO_OF_FOUR).values()


def test_a_tied_head_stays_tied(tmp_path):
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    settings = entry(tmp_path / "store.jsonl", solver="magnitude", reconstruct="pruned")
    modifier = ReasoningAwareSparseGPTModifier(**settings)
    model = oneshot(model=str(folder), recipe=modifier, output_dir=str(tmp_path / "out"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loaded = rac_modifier.load_model(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_weights(weights(loaded), weights(model))


def quantized(*, packed):
    """A model with a module of codes; compressed-tensors' packed ones are no `weight`."""
    model = tiny_model()
    module = model.model.layers[0].mlp.up_proj
    codes = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    del module.weight
    module.register_parameter("weight_packed" if packed else "weight", codes)
    return model


@pytest.mark.parametrize("name", ["model.layers.0", "re:.*layers.0$", "Qwen3MLP"])
def test_ignoring_a_module_that_holds_linear_layers_is_refused(name):
    """llm-compressor would leave out the module itself, and prune what it holds."""
    model = tiny_model()
    with pytest.raises(RacError, match=r"ignore: .* matches model\.layers\.0.*; write") as error:
        find_targets(model, ["Linear"], [name], TWO_OF_FOUR)
    advised = str(error.value).split("'")[-2]
    left = find_targets(model, ["Linear"], [advised], TWO_OF_FOUR).values()
    assert {name for name in linears(model) if name not in left} == {
        name for name in linears(model) if name.startswith(advised[3:-5])
    }


@pytest.mark.parametrize(
    ("model", "targets", "says"),
    [
        (tiny_model, ["re:.*no_such"], "match no linear layer of this Qwen3ForCausalLM; it has"),
        (tiny_model, ["model.norm"], "targets: model.norm is a Qwen3RMSNorm; name Linear layers"),
        (tiny_model, ["Linear", "no_such"], "targets: 'no_such' has no effect: it match"),
        (lambda: tiny_model(tie_word_embeddings=True), ["lm_head"], "shares its weight with the"),
        (lambda: quantized(packed=False), ["Linear"], "up_proj is quantized already; start from"),
        (lambda: quantized(packed=True), ["Linear"], "up_proj is quantized already; start from"),
    ],
)
def test_targets_that_cannot_be_pruned_are_refused(model, targets, says):
    with pytest.raises(RacError, match=says):
        find_targets(model(), targets, [], TWO_OF_FOUR)


# zeros that a model has


@pytest.mark.parametrize("mask_structure", [None, "0:0", "2:4"])
def test_keep_refuses_a_module_without_the_zeros(prune, mask_structure):
    lacks = "2 of every 4" if mask_structure == "2:4" else "0 of its 4,096 weights are zero"
    with pytest.raises(RacError, match=rf"solver: keep keeps .* lacks them \(.*{lacks}"):
        prune(solver="keep", mask_structure=mask_structure)


def test_keep_keeps_exactly_the_zeros_with_or_without_a_pattern(prune, tmp_path, off_policy):
    """Where all modules hold 2:4 it is stored as 2:4, if not asked otherwise; 3:4 is not."""
    settings = {"solver": "keep", "traces": off_policy}
    two_of_four = {"solver": "magnitude", "reconstruct": "pruned"}
    cases = {
        "structured": (two_of_four, None, "2:4", "2:4"),
        "free": (two_of_four, "0:0", "0:0", "unstructured"),
        "uneven": (two_of_four | {"mask_structure": "1:4"}, None, "0:0", "unstructured"),
        "sparser": (two_of_four | {"mask_structure": "3:4"}, None, "0:0", "unstructured"),
    }
    for name, (before, asked, structure, stored) in cases.items():
        sparse, folder = prune(**before), tmp_path / name
        if name == "uneven":
            sparse.model.layers[0].self_attn.q_proj.weight.data[:32] = 0.0
        zeros = {name: module.weight == 0 for name, module in linears(sparse).items()}
        kept = prune(model=sparse, output_dir=folder, mask_structure=asked, **settings)
        for module, mask in zip(linears(kept).values(), zeros.values(), strict=True):
            assert torch.equal(module.weight == 0, mask)
        assert record_of(folder)["mask_structure"] == structure
        assert {row.structure for row in inspect_checkpoint(folder).sparse} == {stored}
    record = record_of(tmp_path / "uneven")
    assert record["pattern"].startswith("the zeros that the model had, 2")
    assert len({round(module["sparsity"], 2) for module in record["modules"]}) > 1


def test_layers_that_no_token_reaches_are_left_out():
    """llm-compressor's `oneshot` loads Gemma 3 from 4B on with its vision tower."""
    model = tiny_gemma(sees=True)
    tower = [name for name in linears(model) if "vision_tower" in name]
    assert tower
    names = set(find_targets(model, ["Linear"], [], TWO_OF_FOUR).values())
    assert names == {name for name in linears(model) if "language_model" in name}
    assert list(find_targets(model, [tower[0]], [], TWO_OF_FOUR).values()) == tower[:1]
