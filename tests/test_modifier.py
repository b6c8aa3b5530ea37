import json
import subprocess
import sys

import pytest
import torch
from compressed_tensors.registry.registry import _REGISTRY
from llmcompressor import oneshot
from llmcompressor.core import active_session
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.pipelines.basic.pipeline import BasicPipeline
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from safetensors import safe_open
from tiny import TOKENS, entry, is_2of4, linears, recipe, save_tiny
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import rac_modifier
from rac_modifier import RacError, ReasoningAwareSparseGPTModifier
from rac_modifier.calibration import seam
from rac_modifier.calibration.batches import CalibrationLoader
from rac_modifier.calibration.settings import CalibrationSettings, TraceSettings
from rac_modifier.calibration.source import build_calibration_set
from rac_modifier.pruning.collector import HessianCollector
from rac_modifier.pruning.hessian import Hessian
from rac_modifier.traces.store import TraceStore


@pytest.fixture
def dense(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.fixture
def prune(tiny_folder, trace_store):
    """Run oneshot on the tiny model with a recipe of ours, changed by `settings`."""

    def prune(model=None, later=(), pipeline="independent", output_dir=None, oneshot_options=None, **settings):
        modifiers = [ReasoningAwareSparseGPTModifier(**entry(trace_store, **settings)), *later]
        return oneshot(
            model=str(tiny_folder) if model is None else model,
            recipe=modifiers,
            pipeline=pipeline,
            output_dir=None if output_dir is None else str(output_dir),
            **(oneshot_options or {}),
        )

    return prune


def gptq_w4() -> GPTQModifier:
    """W4A16 in groups of 32: the preset's 128 are more than the tiny model has."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
    return GPTQModifier(ignore=["lm_head"], config_groups={"group_0": group})


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# --- from a recipe to a checkpoint ---


def test_a_recipe_file_is_all_that_oneshot_needs(tiny_folder, trace_store, tmp_path, dense):
    (tmp_path / "recipe.yaml").write_text(recipe(entry(trace_store)))
    out = tmp_path / "out"
    model = oneshot(model=str(tiny_folder), recipe=str(tmp_path / "recipe.yaml"), output_dir=str(out))
    assert all(is_2of4(m.weight) for m in linears(model).values())
    changed = {n for n in weights(model) if not torch.equal(weights(model)[n], weights(dense)[n])}
    assert changed == {f"{name}.weight" for name in linears(model)}  # lm_head, embeddings and norms are untouched

    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.0.mlp.down_proj.compressed" in names
    assert "model.layers.0.mlp.down_proj.weight" not in names
    loaded = rac_modifier.load_model(out)
    assert_same_weights(weights(loaded), weights(model))
    ids = torch.arange(2, 60).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert "2:4" in (out / "recipe.yaml").read_text()
    assert (out / "README.md").read_text().startswith("---")


def test_a_modifier_object_gives_the_same_weights_as_a_file(tiny_folder, trace_store, prune):
    by_text = oneshot(model=str(tiny_folder), recipe=recipe(entry(trace_store)))
    assert_same_weights(weights(by_text), weights(prune()))


def test_the_traces_are_sampled_where_there_are_none(tiny_folder, tmp_path, monkeypatch, prune, trace_store):
    monkeypatch.chdir(tmp_path)
    model = oneshot(model=str(tiny_folder), recipe=recipe(entry(None)))
    (store,) = (tmp_path / "rac_traces").glob("*.jsonl")
    assert TraceStore.read(store).counts.tokens >= TOKENS
    assert all(is_2of4(m.weight) for m in linears(model).values())


@pytest.mark.parametrize(
    "order",
    [
        "import llmcompressor, rac_modifier",
        "import rac_modifier, llmcompressor",
        "import rac_modifier.calibration.seam",
    ],
)
def test_it_is_registered_whatever_is_imported_first(order):
    code = (
        f"{order}\nfrom llmcompressor.modifiers import ModifierFactory\n"
        "from llmcompressor.pipelines.registry import CalibrationPipeline\n"
        "m = ModifierFactory.create('ReasoningAwareSparseGPTModifier', True, True, sparsity=0.5)\n"
        "print(type(m).__name__, type(CalibrationPipeline.from_modifiers([m])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = "ReasoningAwareSparseGPTModifier ReasoningAwareSequentialPipeline"
    assert done.stdout.strip().splitlines()[-1] == expected


@pytest.mark.parametrize("solver", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("pattern", [{"mask_structure": "2:4"}, {"mask_structure": "0:0", "sparsity": 0.5}])
def test_every_solver_and_pattern_runs_and_is_packed(prune, tmp_path, dense, solver, pattern):
    model = prune(solver=solver, output_dir=tmp_path / "out", **pattern)
    for name, module in linears(model).items():
        zeros = float((module.weight == 0).float().mean())
        assert zeros == pytest.approx(0.5, abs=0.02), name
        if solver != "sparsegpt":  # kept weights are untouched
            kept = module.weight != 0
            assert torch.equal(module.weight[kept], dense.get_submodule(name).weight[kept])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = "sparse-24-bitmask" if "sparsity" not in pattern else "sparse-bitmask"
    assert config["quantization_config"]["sparsity_config"]["format"] == expected
    assert_same_weights(weights(rac_modifier.load_model(tmp_path / "out")), weights(model))


def test_the_run_record_says_what_was_done(prune, tmp_path, tiny_folder, trace_store):
    prune(output_dir=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert record["base_model"] == str(tiny_folder)
    assert record["method"] == "sparsegpt"
    assert record["mask_structure"] == "2:4"
    assert record["calibration"]["tokens"] == TOKENS
    assert record["calibration"]["trace_tokens"] > TOKENS / 3
    assert record["trace_store"] == {"path": str(trace_store), "sha256": TraceStore.read(trace_store).sha256()}
    assert record["versions"]["llmcompressor"]
    assert len(record["modules"]) == 14
    for module in record["modules"]:
        assert module["tokens"] == TOKENS
        assert module["sparsity"] == pytest.approx(0.5, abs=0.01)
        assert 0 < module["relative_error"] < 1
    again = ReasoningAwareSparseGPTModifier(**record["modifier"])  # the record can be run again
    assert again.model_dump(mode="json")["calibration"] == record["modifier"]["calibration"]


# --- saving ---


def test_dense_storage_loads_in_stock_transformers(prune, tmp_path):
    model = prune(output_dir=tmp_path / "out", storage="dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(weights(loaded), weights(model))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / "rac_run.json").exists()


def test_save_compressed_false_stores_dense(prune, tmp_path):
    prune(output_dir=tmp_path / "out", oneshot_options={"save_compressed": False})
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.down_proj.weight" in file.keys()  # noqa: SIM118 - not a dict


def test_a_sharded_save_is_packed_too(prune, tmp_path):
    model = prune()
    model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_same_weights(weights(rac_modifier.load_model(tmp_path / "out")), weights(model))


def test_a_folder_that_holds_a_checkpoint_is_left_and_the_save_goes_beside_it(prune, tmp_path):
    prune(output_dir=tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    model = prune(output_dir=tmp_path / "out", calibration={"tokens": 400})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    beside = tmp_path / "out-1"
    assert_same_weights(weights(rac_modifier.load_model(beside)), weights(model))
    assert AutoTokenizer.from_pretrained(beside).chat_template
    prune(output_dir=tmp_path / "out", calibration={"tokens": 400})
    assert (tmp_path / "out-2" / "model.safetensors").exists()


def test_zeros_filled_after_pruning_are_refused_at_save_by_name(prune, tmp_path):
    model = prune()
    model.model.layers[1].mlp.up_proj.weight.data[0, :4] = 1.0
    with pytest.raises(RacError, match=r"model\.layers\.1\.mlp\.up_proj .*no longer holds.*Nothing was written"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gptq_after_pruning_is_refused_at_save_by_name(prune, tmp_path):
    """W4A16 refits what it quantises and fills zeros (upstream issue 2860)."""
    with pytest.raises(RacError, match=r"model\.layers\.0\.self_attn\.\w+ .*GPTQModifier"):
        prune(later=[gptq_w4()], output_dir=tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
def test_round_to_nearest_fp8_keeps_2of4_and_is_packed(prune, tmp_path, pipeline):
    later = QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="FP8_DYNAMIC")
    model = prune(later=[later], output_dir=tmp_path / "out", pipeline=pipeline)
    assert all(is_2of4(m.weight.float()) for m in linears(model).values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert config["config_groups"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.mlp.up_proj.compressed").dtype == torch.float8_e4m3fn
    loaded = rac_modifier.load_model(tmp_path / "out")
    ids = torch.arange(2, 60).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


# --- the pipelines ---


@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
def test_a_later_modifier_calibrates_on_the_same_tokens_without_padding(prune, monkeypatch, pipeline):
    seen = []
    original = GPTQModifier.calibrate_module

    def spy(self, module, args, output):
        if module.weight.shape == (64, 128):  # down_proj, once a layer
            seen.append(args[0].shape[:-1])
        return original(self, module, args, output)

    monkeypatch.setattr(GPTQModifier, "calibrate_module", spy)
    gptq = GPTQModifier(targets=["Linear"], ignore=["lm_head"], scheme="W8A8")
    prune(later=[gptq], pipeline=pipeline)
    assert {shape[0] for shape in seen} == {1}  # one sequence a batch: nothing to pad
    assert sum(shape[1] for shape in seen) == 2 * TOKENS


def test_both_pipelines_prune_alike(prune):
    assert_same_weights(weights(prune(pipeline="independent")), weights(prune(pipeline="sequential")))


def test_basic_is_refused(prune):
    with pytest.raises(RacError, match='pipeline="basic" does not prune layer by layer'):
        prune(pipeline="basic")


def test_the_lean_loop_prunes_as_upstreams_loop_does(prune, monkeypatch):
    """Both on one sequence a batch, so that the sums are over the same products in the same order."""
    original = CalibrationLoader._grouped
    monkeypatch.setattr(CalibrationLoader, "_grouped", lambda self, batch_tokens: original(self, 0))
    lean = weights(prune())
    monkeypatch.setattr(ReasoningAwareSparseGPTModifier, "stops_forward", False)
    assert_same_weights(lean, weights(prune()))


def test_the_lean_loop_on_padded_batches_gives_the_same_hessians(prune, monkeypatch):
    hessians = []

    class Spy(HessianCollector):
        def take(self, modules):
            groups = super().take(modules)
            hessians.extend(g.hessian.matrix() for g in groups)
            return groups

    monkeypatch.setattr("rac_modifier.modifier.HessianCollector", Spy)
    prune(solver="magnitude")  # which does not let a difference grow from layer to layer
    padded, hessians = hessians, []
    monkeypatch.setattr(ReasoningAwareSparseGPTModifier, "stops_forward", False)
    prune(solver="magnitude")
    assert len(padded) == len(hessians) == 8  # 4 a layer: q/k/v and gate/up share theirs
    for ours, upstream in zip(padded, hessians, strict=True):
        torch.testing.assert_close(ours, upstream, rtol=1e-3, atol=1e-4)


def test_the_lean_loop_saves_work(prune, monkeypatch, dense):
    """Of both layers' down_proj, the last module of each: run to its end in the first batch, and to propagate layer 0."""
    calls, loaders = [], []

    def build(*args, **kwargs):
        made = build_calibration_set(*args, **kwargs)
        loaders.append(made.loader)
        calls.clear()  # of sampling
        return made

    monkeypatch.setattr("rac_modifier.modifier.build_calibration_set", build)
    for layer in dense.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: calls.append(module))
    prune(model=dense)
    assert len(loaders[0]) > 3
    assert len(calls) == 2 + len(loaders[0])


class CalledTwice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.a(self.b(self.a(x)))


def test_a_module_called_twice_is_counted_twice_and_never_stopped_before():
    """`a` and `b` have both been seen when `a` is about to be called again."""
    net = CalledTwice()
    collector = HessianCollector({net.a: "a", net.b: "b"})
    collector.expect([net.a, net.b])
    inputs = {net.a: [], net.b: []}
    batch = 0

    def hook(module, args):
        inputs[module].append(args[0])
        collector.observe(module, args[0], torch.ones(args[0].shape[:-1]), batch)

    for module in (net.a, net.b):
        module.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in range(3):  # noqa: B007 - the hook reads it
            net(torch.randn(2, 5, 4))  # StopForward would come out here
    assert (len(inputs[net.a]), len(inputs[net.b])) == (6, 3)
    for group in collector.take([net.a, net.b]):
        expected = Hessian(4)
        for x in inputs[group.modules[0]]:
            expected.add(x)
        torch.testing.assert_close(group.hessian.matrix(), expected.matrix())


def test_token_weights_decide_what_is_kept(prune):
    prompts_free = prune(calibration={"tokens": TOKENS, "prompt_weight": 0.0})
    assert any(
        not torch.equal(a.weight, b.weight)
        for a, b in zip(linears(prompts_free).values(), linears(prune()).values(), strict=True)
    )


# --- what is pruned ---


def test_targets_and_ignore_are_llm_compressors(prune, dense):
    model = prune(targets="re:.*mlp.*", ignore=["re:.*layers.1.*"])
    pruned = {n for n, m in linears(model).items() if is_2of4(m.weight)}
    assert pruned == {f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}


def test_lm_head_is_pruned_only_when_named(prune):
    model = prune(targets=["lm_head", "re:.*q_proj$"])
    assert is_2of4(model.lm_head.weight)
    assert not is_2of4(prune().lm_head.weight)


def test_a_router_gate_is_left_alone():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from rac_modifier.pruning.patterns import Pattern
    from rac_modifier.pruning.targets import find_targets

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.model.layers[0].mlp.gate = torch.nn.Linear(32, 4, bias=False)  # as in models whose router is a Linear
    names = find_targets(model, ["Linear"], [], Pattern.n_of_m(2, 4)).values()
    assert names
    assert not [n for n in names if n.endswith("gate") or n == "lm_head"]


def test_a_tied_head_stays_tied(tmp_path, trace_store):
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    modifier = ReasoningAwareSparseGPTModifier(**entry(tmp_path / "store.jsonl"))
    model = oneshot(model=str(folder), recipe=modifier, output_dir=str(tmp_path / "out"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loaded = rac_modifier.load_model(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_weights(weights(loaded), weights(model))


# --- what is refused ---


def test_torchrun_is_refused(prune, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RacError, match="does not run under torchrun"):
        prune()


def test_a_dataset_beside_the_recipe_is_refused(prune):
    with pytest.raises(RacError, match="leave the dataset argument out"):
        prune(oneshot_options={"dataset": generic_loader(), "num_calibration_samples": 4})


def test_a_failed_run_leaves_nothing_behind_that_breaks_the_next(prune, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RacError):
        prune()
    monkeypatch.delenv("WORLD_SIZE")
    assert all(is_2of4(m.weight) for m in linears(prune()).values())


# --- next to upstream ---


def generic_loader(count: int = 6) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    rows = [{"input_ids": torch.randint(2, 300, (40,), generator=generator)} for _ in range(count)]
    for row in rows:
        row["attention_mask"] = torch.ones(40, dtype=torch.long)
    return DataLoader(rows, batch_size=1)


ORDINARY = {
    "sparsegpt": lambda: SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["lm_head"]),
    "gptq": gptq_w4,
    "rtn": lambda: QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="FP8_DYNAMIC"),
    "calibrated rtn": lambda: QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="W8A8"),
}


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
def test_recipes_without_us_give_the_same_bits_with_and_without_our_pipelines(tiny_folder, monkeypatch, name, pipeline):
    def run():
        torch.manual_seed(0)
        model = oneshot(
            model=str(tiny_folder), recipe=ORDINARY[name](), dataset=generic_loader(), pipeline=pipeline,
            num_calibration_samples=6,
        )  # fmt: skip
        return weights(model)

    assert type(CalibrationPipeline.from_modifiers([ORDINARY["gptq"]()])) is seam.ReasoningAwareSequentialPipeline
    with_ours = run()
    monkeypatch.setitem(_REGISTRY[CalibrationPipeline], "sequential", SequentialPipeline)
    monkeypatch.setitem(_REGISTRY[CalibrationPipeline], "basic", BasicPipeline)
    assert_same_weights(with_ours, run())


def test_an_ordinary_recipe_after_ours_is_not_fed_our_loader(prune, tiny_folder):
    prune()
    run = oneshot(model=str(tiny_folder), recipe=ORDINARY["sparsegpt"](), dataset=generic_loader(),
                  num_calibration_samples=6)  # fmt: skip
    assert active_session().state.data.calib is not None
    assert not isinstance(active_session().state.data.calib, CalibrationLoader)
    assert is_2of4(run.model.layers[0].mlp.up_proj.weight)


def inputs_of(model, batches) -> dict[str, torch.Tensor]:
    """What each linear layer of the model reads, [tokens, columns]."""
    rows = {name: [] for name in linears(model)}
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: rows[name].append(args[0].flatten(0, -2)))
        for name, module in linears(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def relative_errors(model, dense, inputs) -> dict[str, float]:
    """||W X - W' X||^2 / ||W X||^2 of each linear layer, X as the dense model has it."""
    errors = {}
    for name, module in linears(dense).items():
        wanted = inputs[name] @ module.weight.detach().T
        change = wanted - inputs[name] @ model.get_submodule(name).weight.detach().T
        errors[name] = float(change.square().sum() / wanted.square().sum())
    return errors


@pytest.mark.parametrize("structure", [{"mask_structure": "2:4"}, {"mask_structure": "0:0", "sparsity": 0.5}])
def test_no_worse_than_upstreams_sparsegpt_on_the_same_batches(tiny_folder, trace_store, dense, prune, structure):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    options = entry(trace_store)
    loader = build_calibration_set(
        dense, tokenizer, TraceSettings(**options["traces"]), CalibrationSettings(**options["calibration"]),
        progress=False,
    ).loader.unpadded()  # fmt: skip
    ours = prune(**structure)
    upstream = oneshot(
        model=str(tiny_folder),
        recipe=SparseGPTModifier(
            sparsity=0.5, mask_structure=structure["mask_structure"], targets=["Linear"], ignore=["lm_head"]
        ),
        dataset=DataLoader([{"input_ids": b["input_ids"][0]} for b in loader], batch_size=1),
        num_calibration_samples=len(loader),
    )
    for name in linears(dense):
        mine, theirs = (m.get_submodule(name).weight for m in (ours, upstream))
        same = float(((mine == 0) == (theirs == 0)).float().mean())
        assert same >= (0.99 if "layers.0" in name else 0.95), (name, same)
    inputs = inputs_of(dense, loader)
    mine, theirs = relative_errors(ours, dense, inputs), relative_errors(upstream, dense, inputs)
    for name, error in theirs.items():
        assert mine[name] <= error * 1.02, name
    assert sum(mine.values()) <= sum(theirs.values()) * 1.005


def test_sparsegpt_errs_less_than_magnitude_on_the_traces(trace_store, dense, prune):
    batches = [{"input_ids": torch.tensor([(*t.prompt_ids, *t.completion_ids)])} for t in TraceStore.read(trace_store)]
    inputs = inputs_of(dense, batches)
    ours = relative_errors(prune(), dense, inputs)
    magnitude = relative_errors(prune(solver="magnitude"), dense, inputs)
    assert sum(ours.values()) < 0.8 * sum(magnitude.values())
