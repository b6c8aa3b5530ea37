"""A mixture of experts: every expert pruned, layer by layer, and the checkpoint loads back."""

import json

import pytest
import torch
from compressed_tensors.utils import match_named_modules
from llmcompressor import oneshot
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
from llmcompressor.utils.helpers import calibration_forward_context
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import rac_modifier
from rac_modifier.llmcompressor.stages import Stage, UntraceableError, trace_stages, use_own_configs
from tests.tiny import entry, is_2of4, linears, recipe, tiny_tokenizer

EXPERTS = 4


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The folder of a pruned model, and the model."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_experts=EXPERTS,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=512, eos_token_id=1, pad_token_id=0, bos_token_id=None, initializer_range=0.1,
        tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("moe")
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    model = oneshot(
        model=str(folder / "dense"),
        recipe=recipe(entry(folder / "traces.jsonl")),
        output_dir=str(folder / "out"),
        precision="float32",
    )
    return folder / "out", model


def test_every_expert_is_pruned_and_the_router_is_not(pruned):
    _, model = pruned
    found = linears(model)
    assert sum(".experts." in name for name in found) == 2 * 3 * EXPERTS
    assert [name for name, module in found.items() if not is_2of4(module.weight)] == []
    assert not any(is_2of4(gate.weight) for _, gate in match_named_modules(model, [r"re:.*mlp\.gate$"]))


def test_the_checkpoint_loads_back(pruned):
    folder, model = pruned
    loaded, ids = rac_modifier.load_model(folder, dtype="float32"), torch.arange(5, 35)[None]
    with torch.no_grad():
        # grouped and looped experts add in another order
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_each_layer_is_calibrated_under_the_models_own_attention(pruned):
    """Upstream's tracer loses which attention is in force where a config is passed on, and with it the causal mask."""
    _, model = pruned
    sample = {"input_ids": torch.arange(5, 45).reshape(2, 20)}
    seen = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), calibration_forward_context(model), moe_calibration_context():
        subgraphs = trace_subgraphs(model, sample, ["Qwen3MoeDecoderLayer"], ["create_causal_mask"], 1)
        configs = use_own_configs(model, subgraphs)
        cache = IntermediatesCache([{}], torch.device("cpu"))
        cache.update(0, sample)
        for subgraph in subgraphs:
            Stage([], None, [subgraph], configs).run(model, cache, 0)
        model(**sample, use_cache=False)
    hook.remove()
    torch.testing.assert_close(*seen)


def test_experts_that_are_added_up_in_place_are_not_cut_apart(pruned):
    """Cut there, the next layer would run before they are added."""
    _, model = pruned
    sample = {"input_ids": torch.arange(5, 45).reshape(2, 20)}
    names = {module: name for name, module in linears(model).items()}
    with moe_calibration_context(), pytest.raises(UntraceableError, match="in place"):
        trace_stages(model, sample, names, [])


def test_the_record_says_what_was_degraded(pruned):
    folder, _ = pruned
    order = json.loads((folder / "rac_run.json").read_text())["order"]
    assert (order["order"], order["reconstruct"]) == ("layer", "pruned")
    assert "in place" in order["why"]
