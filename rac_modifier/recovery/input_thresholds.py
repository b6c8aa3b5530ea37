"""Activation sparsity: thresholds below which skipping inputs costs the least KL per byte.

With labels y drawn from the model's p, and g = d log p(y) / d x, a small change delta of an input x
of linear layers costs (Fisher):

    KL = E[(g . delta)^2] / 2,    of x_j alone about x_j^2 E[g_j^2] / 2

Skipping x_j saves column j of the layers that read it, c bytes. The score, of KL per byte, is

    s_j = |x_j| sqrt(E[g_j^2] / c)

and x_j is skipped where s_j is below one level for all layers: thresholds[j] = level |x_j| / s_j.
The level follows from the share of the bytes. TEAL (arXiv 2408.14690) has |x_j| alone, with a share
per layer. E is over generated tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rac_modifier.checkpoint.activation_sparsity import InputThresholds
from rac_modifier.errors import RacError
from rac_modifier.measure.teacher_forcing import TokenSequence
from rac_modifier.recovery.loss import check_head, output_head, predicting_states
from rac_modifier.recovery.student import recomputing
from rac_modifier.runtime.cpu_tuning import matmul
from rac_modifier.runtime.models import evaluating

_SETTING = "activation_sparsity"
# Scores are counted from 2^-40 to 1: a column with a score of 1 costs c / 2 nats.
_LOWEST, _PER_OCTAVE = -40, 32
_LEVELS = -_LOWEST * _PER_OCTAVE
_CHUNK_ELEMENTS = 1 << 24  # logits held in memory

# Called with a group, and x and g [tokens, d] of a sequence in float32.
Visit = Callable[["InputGroup", Tensor, Tensor], None]


@dataclass(eq=False)
class InputGroup:
    """Linear layers that read the same x [tokens, d], and what calibration tokens say of it."""

    modules: tuple[str, ...]  # in the order of their calls
    column_bytes: float  # of column j of all their weights
    squares: Any = 0.0  # sum of g^2 over tokens, [d]
    counts: Tensor = field(default_factory=lambda: torch.zeros(_LEVELS).double())  # x_j by level
    costs: Tensor = field(default_factory=lambda: torch.zeros(_LEVELS).double())  # (g . delta)^2
    tokens: int = 0

    def weight(self) -> Tensor:
        """Return s_j / |x_j|, float32 [d]."""
        weight: Tensor = (self.squares / self.tokens / self.column_bytes).sqrt()
        return weight

    def add_squares(self, x: Tensor, g: Tensor) -> None:
        """Add the tokens of a sequence to E[g^2]."""
        self.squares = self.squares + g.square().sum(0).cpu()
        self.tokens += len(g)

    def add_scores(self, x: Tensor, g: Tensor) -> None:
        """Count the scores of a sequence by level, and what skipping up to each level costs."""
        scores = x.abs() * self.weight().to(x.device)
        level = ((scores.log2() - _LOWEST) * _PER_OCTAVE).clamp(0, _LEVELS - 1).long()
        self.counts += level.flatten().bincount(minlength=_LEVELS).cpu()
        change = x.new_zeros(len(x), _LEVELS).scatter_add_(1, level, x * g)  # -g . delta
        self.costs += change.cumsum(1).square().sum(0).cpu()


def groups_that_read_one_input(
    model: Any, column_bytes: Mapping[str, float]
) -> tuple[list[InputGroup], list[str]]:
    """Return groups of the modules that read the same tensor, and modules that are left dense.

    `column_bytes`: of a column of each module's weight. Left dense is what a forward pass calls not
    once.
    """
    readers: dict[int, list[str]] = {}
    alive: list[Tensor] = []  # so that no other tensor gets the id of one

    def remember(name: str, module: Any, args: tuple[Tensor, ...]) -> None:
        alive.append(args[0])
        readers.setdefault(id(args[0]), []).append(name)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(remember, name))
        for name in column_bytes
    ]
    ids = torch.arange(1, 9, device=model.device)[None]
    try:
        with torch.no_grad(), evaluating(model):
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    called = [name for names in readers.values() for name in names]
    dense = [name for name in column_bytes if called.count(name) != 1]
    kept = [[name for name in names if name not in dense] for names in readers.values()]
    groups = [InputGroup(tuple(g), sum(column_bytes[name] for name in g)) for g in kept if g]
    return groups, dense


class InputScores:
    """Scores of the inputs of a model's `groups` on sequences that it wrote.

    Two passes compute gradients layer by layer, the first for E[g^2], the second for the scores:
    nothing is kept per token. RacError: a head or layers that have no such gradients.
    """

    def __init__(
        self, model: Any, groups: Sequence[InputGroup], sequences: Sequence[TokenSequence]
    ) -> None:
        check_head(model, min(sequences, key=lambda s: len(s[0])), _SETTING)
        self.groups = groups
        self._pass(model, sequences, lambda group, x, g: group.add_squares(x, g))
        for group in groups:
            if not (group.tokens and group.weight().isfinite().all()):
                raise RacError(
                    f"{group.modules[0]}: no finite gradient reaches its input; load the model in "
                    f"float32, or leave {_SETTING} out"
                )
        self._pass(model, sequences, lambda group, x, g: group.add_scores(x, g))

    def thresholds(self, share: float) -> InputThresholds:
        """Return the thresholds that skip this share of the groups' weight bytes per token."""
        groups = self.groups
        size = sum(g.column_bytes * float(g.counts.sum()) for g in groups)
        by_level = torch.stack([g.column_bytes * g.counts for g in groups]).sum(0)
        skipped = torch.cat([torch.zeros(1), by_level.cumsum(0) / size])  # below each level
        costs = torch.stack([g.costs / g.tokens / 2 for g in groups]).sum(0)
        costs = torch.cat([torch.zeros(1), costs])
        at = int((skipped < share).sum()) - 1  # the level is within this step
        part = (share - float(skipped[at])) / float(skipped[at + 1] - skipped[at])
        predicted = torch.lerp(costs[at], costs[at + 1], part)
        level = 2.0 ** (_LOWEST + (at + part) / _PER_OCTAVE)
        largest = torch.finfo(torch.float32).max  # where no gradient arrives
        return InputThresholds(
            {g.modules[0]: (level / g.weight()).clamp(max=largest).float() for g in groups},
            {g.modules[0]: g.modules for g in groups},
            share,
            float(predicted),
        )

    def _pass(self, model: Any, sequences: Sequence[TokenSequence], visit: Visit) -> None:
        """Call `visit` for each sequence and group, with labels that are the same in each pass."""
        inputs: dict[InputGroup, Tensor] = {}
        first, backward = 0, False  # token of the completion; whether layers are recomputed

        def received(group: InputGroup, gradient: Tensor) -> None:
            x, width = inputs.pop(group), gradient.shape[-1]
            visit(group, *(t.reshape(-1, width)[first:].float() for t in (x, gradient)))

        def entered(group: InputGroup, module: Any, args: tuple[Tensor, ...]) -> None:
            if backward:
                inputs[group] = args[0].detach()
            elif args[0].requires_grad:
                args[0].register_hook(partial(received, group))

        def embedded(module: Any, args: Any, output: Tensor) -> Tensor:
            return output.detach().requires_grad_()

        learned = [p for p in model.parameters() if p.requires_grad]
        hooks = [model.get_input_embeddings().register_forward_hook(embedded)]
        for group in self.groups:
            module = model.get_submodule(group.modules[0])
            hooks.append(module.register_forward_pre_hook(partial(entered, group)))
        draw = torch.Generator(model.device).manual_seed(0)
        model.requires_grad_(False)
        try:
            with torch.enable_grad(), evaluating(model), recomputing(model, setting=_SETTING):
                for sequence in sequences:
                    first, backward = sequence[1], False
                    states = predicting_states(model, [sequence])
                    gradient = _gradient_of_labels(states.detach(), output_head(model), draw)
                    backward = True
                    states.backward(gradient)
        finally:
            for parameter in learned:
                parameter.requires_grad_(True)
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def _gradient_of_labels(states: Tensor, head: Any, draw: torch.Generator) -> Tensor:
    """Return d log p(y) / d states [tokens, d], with y drawn from p of each state."""
    weight, gradient = head.weight, torch.empty_like(states)
    step = max(1, _CHUNK_ELEMENTS // len(weight))
    for start in range(0, len(states), step):
        part = slice(start, start + step)
        p = matmul(states[part].to(weight.dtype), weight.T).float().softmax(-1)
        labels = torch.multinomial(p, 1, generator=draw)
        p.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=p.dtype))  # e_y - p
        gradient[part] = matmul(p.to(weight.dtype), weight).to(gradient.dtype)
    return gradient
