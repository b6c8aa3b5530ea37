import pytest
import torch
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline

from rac_modifier import RacError
from rac_modifier.calibration.calibration_set import build_calibration_set
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor import pipeline as seam
from rac_modifier.llmcompressor.input_groups import HessianCollector
from rac_modifier.pruning.hessian import Hessian
from tests.llmcompressor.modifier_helpers import assert_same_weights, weights
from tests.tiny import TOKENS, linears


@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
def test_a_later_modifier_calibrates_on_the_same_tokens_without_padding(calibrate, monkeypatch, pipeline):
    seen = []
    original = GPTQModifier.calibrate_module

    def spy(self, module, args, output):
        if module.weight.shape == (64, 128):  # down_proj, once a layer
            seen.append(args[0].shape[:-1])
        return original(self, module, args, output)

    monkeypatch.setattr(GPTQModifier, "calibrate_module", spy)
    gptq = GPTQModifier(targets=["Linear"], ignore=["lm_head"], scheme="W8A8")
    calibrate(later=[gptq], pipeline=pipeline)
    assert {shape[0] for shape in seen} == {1}  # one sequence a batch: nothing to pad
    assert sum(shape[1] for shape in seen) == 2 * TOKENS


def test_both_pipelines_prune_alike(prune):
    assert_same_weights(weights(prune(pipeline="independent")), weights(prune(pipeline="sequential")))


def test_basic_is_refused(prune):
    with pytest.raises(RacError, match='pipeline="basic" does not prune layer by layer'):
        prune(pipeline="basic")


def upstreams_loop(model, loader, dataset_args, session, device):
    with seam._in_session(session, loader.unpadded()) as unpadded:
        SequentialPipeline.__call__(model, unpadded, dataset_args)


def test_the_lean_loop_prunes_as_upstreams_loop_does(prune, monkeypatch):
    """Both on one sequence a batch, so that the sums are over the same products in the same order."""
    original = CalibrationLoader._grouped
    monkeypatch.setattr(CalibrationLoader, "_grouped", lambda self, batch_tokens: original(self, 0))
    lean = weights(prune(preset="paper"))
    monkeypatch.setattr(seam, "calibrate_by_layer", upstreams_loop)
    assert_same_weights(lean, weights(prune(preset="paper")))


def test_the_lean_loop_on_padded_batches_gives_the_same_hessians(prune, monkeypatch):
    hessians = []

    class Spy(HessianCollector):
        def take(self, modules):
            groups = super().take(modules)
            hessians.extend(g.statistics.hessian.matrix() for g in groups)
            return groups

    monkeypatch.setattr("rac_modifier.llmcompressor.pruning_modifier.HessianCollector", Spy)
    prune(preset="paper", solver="magnitude")  # which does not let a difference grow from layer to layer
    padded, hessians = hessians, []
    monkeypatch.setattr(seam, "calibrate_by_layer", upstreams_loop)
    prune(preset="paper", solver="magnitude")
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

    monkeypatch.setattr("rac_modifier.llmcompressor.calibrating_modifier.build_calibration_set", build)
    for layer in dense.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: calls.append(module))
    prune(model=dense, preset="paper")
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
        torch.testing.assert_close(group.statistics.hessian.matrix(), expected.matrix())


def test_token_weights_decide_what_is_kept(prune):
    prompts_free = prune(calibration={"tokens": TOKENS, "prompt_weight": 0.0})
    assert any(
        not torch.equal(a.weight, b.weight)
        for a, b in zip(linears(prompts_free).values(), linears(prune()).values(), strict=True)
    )
