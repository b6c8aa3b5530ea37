"""A mixture of experts: every expert pruned, group by group, on its own tokens; the router left alone; packed and loaded back."""

import json

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
from llmcompressor.utils.helpers import calibration_forward_context
from transformers import AutoModelForCausalLM

import rac_modifier
from rac_modifier import RacError
from rac_modifier.llmcompressor import resume
from rac_modifier.llmcompressor.plan import Stage, use_own_configs
from rac_modifier.llmcompressor.run import Run
from tests.tiny import EXPERTS, entry, is_2of4, linears, recipe, save_tiny_experts

INT8 = {"config_groups": {"all": {"weights": {"num_bits": 8, "strategy": "channel"}}}}


@pytest.fixture(scope="module", params=["qwen3", "mixtral", "qwen2"])
def pruned(request, tmp_path_factory):
    """The folder of a pruned model, and the model."""
    folder = tmp_path_factory.mktemp(request.param)
    return run(folder, request.param)


def run(folder, kind="qwen3", name="out", oneshot_options=None, **settings):
    if not (folder / "dense").exists():
        save_tiny_experts(folder / "dense", kind)
    model = oneshot(
        model=str(folder / "dense"),
        recipe=recipe(entry(folder / "traces.jsonl", **settings)),
        output_dir=str(folder / name),
        precision="float32",
        **(oneshot_options or {}),
    )
    return folder / name, model


def record_of(folder):
    return json.loads((folder / "rac_run.json").read_text())


def routers(state):
    return {
        name: value
        for name, value in state.items()
        if name.endswith((".mlp.gate.weight", "shared_expert_gate.weight"))
    }


def test_every_expert_is_pruned(pruned):
    _, model = pruned
    found = {
        name: module
        for name, module in linears(model).items()
        if not name.endswith("shared_expert_gate")
    }
    assert sum(".experts." in name for name in found) == 2 * 3 * EXPERTS
    assert [name for name, module in found.items() if not is_2of4(module.weight)] == []


def test_the_router_keeps_every_bit(pruned):
    folder, _ = pruned
    before = routers(AutoModelForCausalLM.from_pretrained(folder.parent / "dense").state_dict())
    after = routers(rac_modifier.load_model(folder, dtype="float32").state_dict())
    assert len(before) >= 2
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_packed_checkpoint_loads_back_bit_by_bit(pruned):
    folder, model = pruned
    loaded = rac_modifier.load_model(folder, dtype="float32")
    for layer, theirs in zip(model.model.layers, loaded.model.layers, strict=True):
        for number in range(EXPERTS):
            expert = layer.mlp.experts[number]
            gate_up = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
            assert torch.equal(gate_up, theirs.mlp.experts.gate_up_proj[number])
            assert torch.equal(expert.down_proj.weight, theirs.mlp.experts.down_proj[number])
    ids = torch.arange(5, 35)[None]
    with torch.no_grad():  # grouped and looped experts add in another order
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_it_goes_group_by_group_towards_the_dense_outputs(pruned):
    folder, _ = pruned
    record = record_of(folder)
    assert record["order"] == {"order": "group", "why": "order: auto", "reconstruct": "dense"}
    groups = [
        [name.removeprefix("model.layers.0.") for name in group["modules"]]
        for group in record["time"]["groups"]
    ]
    first = groups[: len(groups) // 2]
    of_experts = [name for group in first for name in group if ".experts." in name]
    assert {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"} == set(first[0])
    assert len(of_experts) == 3 * EXPERTS
    for number in range(EXPERTS):
        own = [group for group in first if f"mlp.experts.{number}." in group[0]]
        assert [len(group) for group in own] == [2, 1], "gate and up, then down"


def test_the_record_says_how_many_tokens_each_layer_had(pruned):
    folder, _ = pruned
    record = record_of(folder)
    said, tokens = record["experts"], {row["name"]: row["tokens"] for row in record["modules"]}
    total = tokens["model.layers.0.self_attn.q_proj"]
    assert (said["calibrated on"], said["floor"]) == ("routed", 512)
    assert sorted(said["layers"]) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for name, layer in said["layers"].items():
        own = [tokens[f"{name}.{number}.down_proj"] for number in range(EXPERTS)]
        starved = {
            expert: layer["starved"].get(f"{name}.{expert}", {"added": 0})["added"]
            for expert in range(EXPERTS)
        }
        assert sum(own) - sum(starved.values()) == 2 * total, "each token has two experts"
        assert min(own) >= 512
        assert max(own) < total, "no expert got every token"
        assert layer["routed"]["most"] == max(own[e] for e in range(EXPERTS) if not starved[e])
        for number in range(EXPERTS):
            one = {
                tokens[f"{name}.{number}.{part}"] for part in ("gate_proj", "up_proj", "down_proj")
            }
            assert len(one) == 1


def test_quantized_experts_are_pruned_and_rounded(tmp_path):
    folder, model = run(tmp_path, quantization=INT8)
    assert record_of(folder)["order"]["order"] == "group"
    loaded, ids = rac_modifier.load_model(folder, dtype="float32"), torch.arange(5, 35)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_all_tokens_where_the_recipe_asks_for_them(tmp_path):
    folder, _ = run(tmp_path, experts="all")
    record = record_of(folder)
    tokens = {row["name"]: row["tokens"] for row in record["modules"]}
    assert record["experts"]["calibrated on"] == "all"
    assert "floor" not in record["experts"]
    assert len(set(tokens.values())) == 1


def test_layer_by_layer_every_expert_gets_all_tokens_and_the_record_says_why(tmp_path):
    folder, _ = run(tmp_path, oneshot_options={"sequential_targets": ["Qwen3MoeDecoderLayer"]})
    record = record_of(folder)
    assert (record["order"]["order"], record["order"]["reconstruct"]) == ("layer", "pruned")
    assert record["experts"]["calibrated on"] == "all"
    assert "sequential_targets" in record["experts"]["why"]
    assert len({row["tokens"] for row in record["modules"]}) == 1


def test_a_part_of_the_experts_can_be_left_dense(tmp_path):
    _, model = run(
        tmp_path, ignore=["re:.*experts.2.*", "re:.*layers.1.*down_proj"], storage="dense"
    )
    for name, module in linears(model).items():
        dense = ".experts.2." in name or ("layers.1" in name and "down_proj" in name)
        assert is_2of4(module.weight) is not dense, name


def test_all_experts_and_only_the_routed_ones_contradict_each_other(tmp_path):
    with pytest.raises(
        RacError, match=r"moe_calibrate_all_experts=False, and the recipe has experts: all"
    ):
        run(tmp_path, experts="all", oneshot_options={"moe_calibrate_all_experts": False})


def test_upstreams_switch_changes_nothing_where_experts_are_routed(tmp_path):
    _, one = run(tmp_path)
    _, two = run(tmp_path, name="again", oneshot_options={"moe_calibrate_all_experts": False})
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )


def test_a_killed_run_goes_on_between_two_experts(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "_SAVE_SECONDS", 0.0)
    _, whole = run(tmp_path)
    original, calls = Run.prune, []

    def killed(self, groups, per_call=None):
        calls.append([self.names[module] for group in groups for module in group.modules])
        if (
            len(calls) == 2 + 2 * 2
        ):  # q/k/v, o, one expert, and gate and up of the next one are there
            raise KeyboardInterrupt
        original(self, groups, per_call)

    monkeypatch.setattr(Run, "prune", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, name="killed")
    assert calls[-1] == ["model.layers.0.mlp.experts.1.down_proj"]
    folder, resumed = run(tmp_path, name="killed")
    assert calls[6] == calls[5], "it goes on with what was not written"
    assert record_of(folder)["experts"] == record_of(tmp_path / "out")["experts"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    "settings", [{"solver": "sparsegpt"}, {"solver": "sparsegpt", "reconstruct": "pruned"}], ids=str
)
def test_a_run_killed_among_experts_that_were_solved_at_once_ends_with_the_same_bytes(
    tmp_path, monkeypatch, settings
):
    """Gate and up of all four are one product per step: solved again without those that were put back, they would have other
    bits. So none of them counts until all are there."""
    from rac_modifier.llmcompressor import solving
    from rac_modifier.llmcompressor.report import Progress

    monkeypatch.setattr(resume, "_SAVE_SECONDS", 0.0)
    solved, inner = [], solving.solve_many

    def counted(method, problems, **options):
        if problems[0].names[0].startswith("rehearsal"):  # of the memory check
            return inner(method, problems, **options)
        solved.append(
            [name.removeprefix("model.layers.") for problem in problems for name in problem.names]
        )
        return inner(method, problems, **options)

    monkeypatch.setattr(solving, "solve_many", counted)
    folder, _ = run(tmp_path, **settings)
    undisturbed, expected = list(solved), weights_of(folder)
    assert [len(names) for names in undisturbed[:4]] == [3, 1, 2 * EXPERTS, EXPERTS]

    done, calls = Progress.done, []

    def killed(self, names):
        calls.append(names)
        if len(calls) == 2 + 2:  # q/k/v, o, and two of the four experts' gate and up are put back
            raise KeyboardInterrupt
        done(self, names)

    monkeypatch.setattr(Progress, "done", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, name="killed", **settings)
    solved.clear()
    folder, _ = run(tmp_path, name="killed", **settings)
    assert solved == undisturbed[2:]
    assert weights_of(folder) == expected


def weights_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_each_layer_is_calibrated_under_the_models_own_attention(pruned):
    """Upstream's tracer loses which attention is in force where a config is passed on, and with it the causal mask."""
    _, model = pruned
    sample = {"input_ids": torch.arange(5, 45).reshape(2, 20)}
    seen = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad(), calibration_forward_context(model), moe_calibration_context():
        layer = type(model.model.layers[0]).__name__
        subgraphs = trace_subgraphs(model, sample, [layer], ["create_causal_mask"], 1)
        configs = use_own_configs(model, subgraphs)
        cache = IntermediatesCache([{}], torch.device("cpu"))
        cache.update(0, sample)
        for subgraph in subgraphs:
            Stage([], None, [subgraph], configs).run(model, cache, 0)
        model(**sample, use_cache=False)
    hook.remove()
    torch.testing.assert_close(*seen)
