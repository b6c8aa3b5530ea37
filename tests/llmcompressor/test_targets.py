"""Which modules are pruned, and which pattern each gets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmcompressor import oneshot
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import rac_modifier
from rac_modifier import RacError, ReasoningAwareSparseGPTModifier
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.llmcompressor.targets import allocated_shares, find_targets, patterns_for
from rac_modifier.settings.pattern import Pattern
from tests.llmcompressor.conftest import record_of
from tests.llmcompressor.modifier_helpers import assert_same_weights, weights
from tests.tiny import entry, is_2of4, linears, save_tiny, tiny_model

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


def test_a_router_gate_is_left_alone():
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.model.layers[0].mlp.gate = torch.nn.Linear(32, 4, bias=False)  # as in some models
    names = find_targets(model, ["Linear"], [], TWO_OF_FOUR).values()
    assert names
    assert not [n for n in names if n.endswith("gate") or n == "lm_head"]


def test_a_tied_head_stays_tied(tmp_path):
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    settings = entry(tmp_path / "store.jsonl", solver="magnitude", reconstruct="pruned")
    modifier = ReasoningAwareSparseGPTModifier(**settings)
    model = oneshot(model=str(folder), recipe=modifier, output_dir=str(tmp_path / "out"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loaded = rac_modifier.load_model(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_weights(weights(loaded), weights(model))


def quantized(model):
    module = model.model.layers[0].mlp.up_proj
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("model", "targets", "says"),
    [
        (
            tiny_model,
            ["re:.*no_such"],
            "match no linear layer of this Qwen3ForCausalLM; it has, for",
        ),
        (tiny_model, ["model.norm"], "targets name model.norm, a Qwen3RMSNorm; only Linear layers"),
        (
            tiny_model,
            ["Linear", "no_such"],
            "targets: 'no_such' has no effect, since it matches no",
        ),
        (
            lambda: tiny_model(tie_word_embeddings=True),
            ["lm_head"],
            "shares its weight with the in",
        ),
        (
            lambda: quantized(tiny_model()),
            ["Linear"],
            "up_proj has a torch.int8 weight; prune the m",
        ),
    ],
)
def test_targets_that_cannot_be_pruned_are_refused(model, targets, says):
    with pytest.raises(RacError, match=says):
        find_targets(model(), targets, [], TWO_OF_FOUR)


# shares of an allocation


@given(
    st.lists(st.tuples(st.integers(2, 5000), st.floats(0.0, 1.0)), min_size=1, max_size=12),
    st.floats(0.05, 0.95),
)
@settings(max_examples=100)
def test_the_total_is_exact_to_the_weight(modules, sparsity):
    sizes = {f"m{i}": size for i, (size, _) in enumerate(modules)}
    shares = {f"m{i}": share for i, (_, share) in enumerate(modules)}
    budget = int(sum(sizes.values()) * sparsity)
    if not len(sizes) <= budget <= sum(sizes.values()) - len(sizes):
        return
    patterns = patterns_for(shares, sizes, sparsity)
    # as the solvers count
    assert sum(int(sizes[name] * pattern.sparsity) for name, pattern in patterns.items()) == budget


def test_shares_that_fit_are_kept_and_other_modules_take_what_is_missing():
    sizes = {"a": 100, "b": 300}
    patterns = patterns_for({"a": 0.8, "b": 0.4}, sizes, 0.5)
    assert {n: int(sizes[n] * p.sparsity) for n, p in patterns.items()} == {"a": 80, "b": 120}
    assert allocated_shares({"a": 0.8, "b": 0.4}, sizes, 0.5) == {"a": 0.8, "b": 0.4}
    assert allocated_shares({"a": 0.8}, {"a": 100, "b": 300, "c": 100}, 0.5) == pytest.approx(
        {"a": 0.8, "b": 0.425, "c": 0.425}
    )


def test_a_list_that_cannot_average_is_refused():
    with pytest.raises(RacError, match=r"names every module and prunes 0\.7500"):
        allocated_shares({"a": 0.75, "b": 0.75}, {"a": 10, "b": 10}, 0.5)
    with pytest.raises(RacError, match=r"a share of -0\.300"):
        allocated_shares({"a": 0.9}, {"a": 300, "b": 100}, 0.6)


def zeros(model) -> dict[str, int]:
    return {name: int((module.weight == 0).sum()) for name, module in linears(model).items()}


def total(model) -> int:
    return sum(module.weight.numel() for module in linears(model).values())


def test_the_average_is_exact_and_each_module_has_its_own(prune, tmp_path):
    allocation = {"re:.*down_proj": 0.3, "model.layers.0.mlp.down_proj": 0.5}
    settings = {"mask_structure": "0:0", "sparsity": 0.6, "reconstruct": "pruned"}
    model = prune(allocation=allocation, output_dir=tmp_path / "out", **settings)
    assert sum(zeros(model).values()) == int(total(model) * 0.6)
    record = record_of(tmp_path / "out")
    shares = {module["name"]: module["sparsity"] for module in record["modules"]}
    assert len(set(shares.values())) > 2
    for name, module in linears(model).items():
        assert shares[name] == pytest.approx(zeros(model)[name] / module.weight.numel())
    assert shares["model.layers.0.mlp.down_proj"] == pytest.approx(0.5, abs=1e-3)
    assert shares["model.layers.1.mlp.down_proj"] == pytest.approx(0.3, abs=1e-3)
    assert "more in some modules than in others" in record["pattern"]
    assert zeros(rac_modifier.load_model(tmp_path / "out")) == zeros(model)
    module = model.model.layers[0].mlp.down_proj
    module.weight.data[:24] = 1.0  # enough zeros are left for the 30 % of others
    with pytest.raises(RacError, match=r"layers\.0\.mlp\.down_proj .*50 %"):
        model.save_pretrained(tmp_path / "changed")


@pytest.mark.parametrize("solver", ["sparsegpt", "wanda", "magnitude"])
def test_every_solver_prunes_each_module_by_its_share(prune, solver):
    settings = {"mask_structure": "0:0", "sparsity": 0.5, "reconstruct": "pruned"}
    model = prune(solver=solver, allocation={"re:.*q_proj": 0.8, "re:.*k_proj": 0.2}, **settings)
    counts = zeros(model)
    for name, module in linears(model).items():
        share = 0.8 if "q_proj" in name else 0.2 if "k_proj" in name else None
        if share:
            assert counts[name] / module.weight.numel() == pytest.approx(share, abs=0.02)
    assert sum(counts.values()) == pytest.approx(total(model) * 0.5, abs=14 * 64)


# zeros that a model has


@pytest.mark.parametrize("mask_structure", [None, "0:0", "2:4"])
def test_keep_refuses_a_module_without_the_zeros(prune, mask_structure):
    lacks = "2 of every 4" if mask_structure == "2:4" else "0 of its 4,096 weights are zero"
    with pytest.raises(RacError, match=rf"solver: keep keeps .* lacks them \(.*{lacks}"):
        prune(solver="keep", mask_structure=mask_structure)


def test_keep_keeps_exactly_the_zeros_with_or_without_a_pattern(prune, tmp_path, off_policy):
    """Where all modules hold 2:4 it is stored as 2:4, if not asked otherwise."""
    settings = {"solver": "keep", "traces": off_policy}
    two_of_four = {"solver": "magnitude", "reconstruct": "pruned"}
    uneven = {"mask_structure": None, "sparsity": 0.3, "allocation": {"re:.*q_proj": 0.6}}
    cases = {
        "structured": (two_of_four, None, "2:4", "2:4"),
        "free": (two_of_four, "0:0", "0:0", "unstructured"),
        "uneven": (two_of_four | uneven, None, "0:0", "unstructured"),
    }
    for name, (before, asked, structure, stored) in cases.items():
        sparse, folder = prune(**before), tmp_path / name
        zeros = {name: module.weight == 0 for name, module in linears(sparse).items()}
        kept = prune(model=sparse, output_dir=folder, mask_structure=asked, **settings)
        for module, mask in zip(linears(kept).values(), zeros.values(), strict=True):
            assert torch.equal(module.weight == 0, mask)
        assert record_of(folder)["mask_structure"] == structure
        assert {row.structure for row in inspect_checkpoint(folder).sparse} == {stored}
    record = record_of(tmp_path / "uneven")
    assert record["pattern"] == "the zeros that the model had, 30 % of the weights"
    assert len({round(module["sparsity"], 2) for module in record["modules"]}) > 1
