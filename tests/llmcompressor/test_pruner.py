"""The loops need no more of a modifier than `Pruner` lists."""

import pytest
import torch
from llmcompressor.args import DatasetArguments
from llmcompressor.core import create_session
from llmcompressor.pipelines.registry import CalibrationPipeline

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.calibration.mixture import CalibrationSequence, compose
from rac_modifier.llmcompressor.pipeline import Run, put_in_place, take_away
from rac_modifier.llmcompressor.pruner import Pruner
from rac_modifier.processes import Processes
from rac_modifier.settings.calibration import CalibrationSettings
from tests.tiny import entry, linears, tiny_model


def loader() -> CalibrationLoader:
    generator = torch.Generator().manual_seed(1)
    sequences = [
        CalibrationSequence(
            tuple(torch.randint(2, 300, (12,), generator=generator).tolist()), 0, "traces"
        )
        for _ in range(4)
    ]
    return CalibrationLoader(sequences, compose(sequences), CalibrationSettings(batch_tokens=32), 0)


class Recorder:
    """Exactly the members of `Pruner`; it prunes nothing and keeps what it was called with."""

    def __init__(self, model, loader, order, known):
        self.names = {module: name for name, module in linears(model).items()}
        self.loader, self.order, self.needs_dense_stream = loader, order, False
        self.chosen, self.checked, self.started, self.pruned = None, None, [], []
        self.before, self.known, self.restored, self.ended = known, set(), [], 0
        self.experts, self.expert_floor, self.processes, self.recorded = (
            "routed",
            1,
            Processes(),
            {},
        )

    def calibrated_modules(self):
        return dict(self.names)

    def use_order(self, order, why):
        self.chosen = order, why

    def check_memory(self, model, groups, onload, offload):
        self.checked = groups
        return 0

    def resume(self):
        self.known = {name for name in self.names.values() if self.before and self.before in name}

    def was_pruned(self, modules):
        return bool(modules) and {self.names[module] for module in modules} <= self.known

    def restore(self, modules):
        self.restored += [self.names[module] for module in modules]

    def on_subgraph_start(self, modules):
        self.started.append([self.names[module] for module in modules if module in self.names])

    def end_lanes(self, count):
        self.ended += count

    def prune_groups(self, groups, together=None):
        for group in groups:
            self.pruned.append(
                ([self.names[module] for module in group.modules], group.statistics.hessian.tokens)
            )

    def record_experts(self, name, tokens):
        self.recorded[name] = tokens


def run(order, known="") -> Recorder:
    model, made = tiny_model(), loader()
    pruner = Recorder(model, made, order, known)
    with create_session() as session:
        session.initialize(recipe=None, model=model)
        session.lifecycle.recipe.modifiers.append(_Silent(pruner))
        put_in_place(session, Run(made, session.lifecycle.recipe.modifiers[0]))
        CalibrationPipeline.load_from_registry("sequential")(model, None, DatasetArguments())
        take_away(session)
    return pruner


class _Silent:
    """A recipe's modifier as the session calls it, around a pruner."""

    def __init__(self, pruner):
        self.pruner = pruner

    def __getattr__(self, name):
        return getattr(self.pruner, name)

    def update_event(self, **kwargs):
        pass


def test_group_by_group_with_nothing_but_a_pruner():
    pruner = run("auto")
    assert pruner.chosen == ("group", "order: auto")
    assert [len(group) for group in pruner.checked] == [3, 1, 2, 1] * 2
    assert [len(names) for names, _ in pruner.pruned] == [3, 1, 2, 1] * 2
    assert {tokens for _, tokens in pruner.pruned} == {48}
    assert pruner.started == []


def test_layer_by_layer_with_nothing_but_a_pruner():
    pruner = run("layer")
    assert pruner.chosen == ("layer", "order: layer")
    assert pruner.checked == []
    assert [len(names) for names in pruner.started] == [7, 7]
    assert pruner.pruned == []


@pytest.mark.parametrize("order", ["auto", "layer"])
def test_what_is_pruned_already_is_restored_and_needs_no_statistics(order):
    """Its part of the model still runs, so the statistics of what comes after it are the same."""
    pruner = run(order, known="layers.0")
    assert sorted(pruner.restored) == sorted(pruner.known)
    assert len(pruner.known) == 7
    if order == "auto":
        assert all("layers.1" in name for names, _ in pruner.pruned for name in names)
        assert [len(names) for names, _ in pruner.pruned] == [3, 1, 2, 1]
    else:
        assert [len(names) for names in pruner.started] == [7]


@pytest.mark.parametrize("name", [name for name in vars(Pruner) if not name.startswith("_")])
def test_the_modifier_is_a_pruner(name):
    assert hasattr(ReasoningAwareSparseGPTModifier(**entry()), name)
