"""A run against its definition: before each group, the whole model is run anew."""

import pytest
import torch
import torch.nn.functional as F
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor import statistics
from rac_modifier.llmcompressor.run import Run
from rac_modifier.llmcompressor.statistics import DenseStream
from rac_modifier.pruning.solve import solve
from rac_modifier.settings.pattern import Pattern
from tests.tiny import EXPERTS, entry, linears, save_tiny_experts

QKV, O_PROJ = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]
MLP = [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
FLOOR, ALL = 700, 10**9


def eager(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def run_on(model, store, **settings):
    modifier = ReasoningAwareSparseGPTModifier(**entry(store, **settings))
    oneshot(model=model, recipe=modifier)
    return modifier


def given_to(model, module, loader):
    """The arguments of `module` for all tokens, joined, and the weight of each token."""
    seen = []
    hook = module.register_forward_pre_hook(
        lambda m, args: seen.append([a.detach().flatten(0, -2) for a in args])
    )
    with torch.no_grad():
        for batch in loader:
            model(**batch, use_cache=False)
    hook.remove()
    token_weights = torch.cat([w.flatten() for w in loader.token_weights])
    return [torch.cat(parts) for parts in zip(*seen, strict=True)], token_weights


def moment(x, weights, other=None):
    x, weights = x[weights > 0].double(), weights[weights > 0].double()
    left = x if other is None else other[: len(x)]
    return 2 / weights.sum() * (left * weights.unsqueeze(1)).T @ x


def prune_by_definition(modules, x, x_dense, weights):
    """Prune modules that read `x`; towards the outputs on `x_dense`, if given."""
    moments, used = None, weights > 0
    originals = [module.weight.detach() for module in modules]
    if x_dense is not None:
        cross = moment(x, weights, (x_dense - x)[used].double()).float()
        moments = [weight @ cross for weight in originals]
    solutions = solve(
        "sparsegpt",
        originals,
        moment(x, weights).float(),
        Pattern.parse("2:4", None),
        cross_moment=moments,
    )
    for module, solution in zip(modules, solutions, strict=True):
        module.weight.data.copy_(solution.weight)


def assert_close(model, expected):
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        # a tie that rounding turns another way changes single weights; the modules must agree
        close = torch.isclose(ours, theirs, rtol=1e-3, atol=1e-4).float().mean()
        assert close > 0.98, (name, float(close))


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize(
    "settings",
    [
        {"reconstruct": "dense", "order": "group"},
        {"reconstruct": "pruned", "order": "group"},
        {"preset": "paper"},
    ],
    ids=str,
)
def test_it_is_pruning_each_group_on_a_model_run_anew(tiny_folder, trace_store, settings):
    """The paper's order takes all inputs of a layer while none of its modules is pruned."""
    model, expected, dense = eager(tiny_folder), eager(tiny_folder), eager(tiny_folder)
    modifier = run_on(model, trace_store, solver="sparsegpt", **settings)
    loader = modifier.calibration_set.loader
    for number in range(2):
        groups = [
            [f"model.layers.{number}.{name}" for name in group] for group in (QKV, O_PROJ, *MLP)
        ]
        before = eager(tiny_folder)
        before.load_state_dict(expected.state_dict())
        for names in groups:
            modules = [expected.get_submodule(name) for name in names]
            source = before if "preset" in settings else expected
            (x,), weights = given_to(source, source.get_submodule(names[0]), loader)
            x_dense = None
            if settings.get("reconstruct") == "dense":
                (x_dense,), _ = given_to(dense, dense.get_submodule(names[0]), loader)
            prune_by_definition(modules, x, x_dense, weights)
    assert_close(model, expected)


def test_a_dense_stream_that_waits_gives_the_same_bits_and_keeps_one_batch(
    tiny_folder, trace_store, monkeypatch
):
    wide: list[int] = []  # for each read of down's inputs, the batches of which they are kept
    inner = DenseStream.inputs

    def count(cache: IntermediatesCache) -> int:
        values = [value.value for batch in cache.batch_intermediates for value in batch.values()]
        return sum(torch.is_tensor(value) and value.shape[-1] == 128 for value in values)

    def inputs(self, stage, batch):
        x = inner(self, stage, batch)
        if x.shape[-1] == 128:
            wide.append(count(self.cache))
        return x

    def run():
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        calibration = {"tokens": 1500, "batch_tokens": 256}
        run_on(model, trace_store, calibration=calibration, solver="sparsegpt")
        return model

    monkeypatch.setattr(DenseStream, "inputs", inputs)
    late = run()
    assert max(wide) == 1
    wide.clear()
    monkeypatch.setattr(statistics, "saves_by_waiting", lambda stage, after, tokens: False)
    kept = run()
    assert max(wide) > 3
    for (name, ours), theirs in zip(linears(late).items(), linears(kept).values(), strict=True):
        assert torch.equal(ours.weight, theirs.weight), name


# experts, on exactly the tokens that are routed to each


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return save_tiny_experts(tmp_path_factory.mktemp("experts") / "dense", num_hidden_layers=1)


@pytest.fixture
def prune_mixture(mixture, monkeypatch):
    """Prune with these settings; return the model, the loader and each module's Hessian by name."""
    hessians, inner = {}, Run.prune

    def spy(self, groups, per_call=None):
        for group in groups:
            for module in group.modules:
                hessians[self.names[module]] = group.statistics.hessian.matrix().double()
        inner(self, groups, per_call)

    monkeypatch.setattr(Run, "prune", spy)

    def prune_mixture(**settings):
        hessians.clear()
        model = linearize_moe(eager(mixture))
        store = mixture.parent / "traces.jsonl"
        modifier = run_on(model, store, solver="sparsegpt", **settings)
        return model, modifier.calibration_set.loader, dict(hessians)

    return prune_mixture


def used_rows(x, router, chosen, weights, expert, floor):
    """The definition: tokens routed to the expert, and the nearest other ones up to the floor."""
    real = weights > 0
    own = (chosen == expert).any(1) & real
    others = [i for i in range(len(own)) if real[i] and not own[i]]
    missing = min(max(floor - int(own.sum()), 0), len(others))
    share = (x @ router.weight.T).softmax(1)
    near = share[:, expert] / share.gather(1, chosen).min(1).values
    own[sorted(others, key=lambda i: -float(near[i].detach()))[:missing]] = True
    return own


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("floor", [1, FLOOR, ALL])
def test_the_hessian_of_an_expert_is_that_of_its_tokens(prune_mixture, floor):
    model, loader, hessians = prune_mixture(reconstruct="pruned", expert_floor=floor)
    layer = model.model.layers[0]
    (x, chosen, _), weights = given_to(model, layer.mlp.experts, loader)
    counts, everyone = [], moment(x, weights)
    for number in range(EXPERTS):
        name, expert = f"model.layers.0.mlp.experts.{number}", layer.mlp.experts[number]
        ours = hessians[f"{name}.gate_proj"]
        if floor == ALL:
            torch.testing.assert_close(ours, everyone, rtol=1e-4, atol=1e-5)
            continue
        rows = used_rows(x, layer.mlp.gate, chosen, weights, number, floor)
        torch.testing.assert_close(ours, moment(x[rows], weights[rows]), rtol=1e-4, atol=1e-5)
        assert torch.equal(ours, hessians[f"{name}.up_proj"])
        # far from what all tokens would have given, so this test fails if they are used
        assert (ours - everyone).norm() > 0.02 * everyone.norm()
        gate, up = (F.linear(x[rows], getattr(expert, p).weight) for p in ("gate_proj", "up_proj"))
        down = moment(F.silu(gate) * up, weights[rows])
        torch.testing.assert_close(hessians[f"{name}.down_proj"], down, rtol=1e-4, atol=1e-6)
        counts.append(int(((chosen == number).any(1) & (weights > 0)).sum()))
    if floor != ALL:
        assert min(counts) < FLOOR < max(counts), "the floor matters for some experts"


@pytest.mark.usefixtures("float32_products")
def test_a_mixture_is_pruned_group_by_group_as_if_run_anew_before_each(mixture, prune_mixture):
    model, loader, _ = prune_mixture(reconstruct="dense", expert_floor=FLOOR)
    expected, original = linearize_moe(eager(mixture)), linearize_moe(eager(mixture))
    layer, of_dense = expected.model.layers[0], original.model.layers[0]
    for group in (QKV, O_PROJ):
        modules = [layer.get_submodule(name) for name in group]
        (x,), weights = given_to(expected, modules[0], loader)
        (x_dense,), _ = given_to(original, of_dense.get_submodule(group[0]), loader)
        prune_by_definition(modules, x, x_dense, weights)
    (x, chosen, _), weights = given_to(expected, layer.mlp.experts, loader)
    (x_dense, _, _), _ = given_to(original, of_dense.mlp.experts, loader)
    for number in range(EXPERTS):
        rows = used_rows(x, layer.mlp.gate, chosen, weights, number, FLOOR)
        expert, dense_expert = layer.mlp.experts[number], of_dense.mlp.experts[number]
        modules = [expert.up_proj, expert.gate_proj]
        prune_by_definition(modules, x[rows], x_dense[rows], weights[rows])
        down, down_dense = (
            F.silu(F.linear(read[rows], e.gate_proj.weight))
            * F.linear(read[rows], e.up_proj.weight)
            for e, read in ((expert, x), (dense_expert, x_dense))
        )
        prune_by_definition([expert.down_proj], down.detach(), down_dense.detach(), weights[rows])
    assert_close(model, expected)


def test_each_expert_ends_closer_to_the_dense_one_than_with_all_tokens(mixture, prune_mixture):
    """What the whole is for, measured on the outputs of the layer."""
    errors, dense = {}, linearize_moe(eager(mixture))
    for floor in (64, ALL):
        model, loader, _ = prune_mixture(expert_floor=floor)
        (ours,), weights = given_to(model, model.model.norm, loader)
        (theirs,), _ = given_to(dense, dense.model.norm, loader)
        errors[floor] = float((ours - theirs)[weights > 0].norm())
    assert errors[64] < errors[ALL], errors
