"""How much memory pruning needs beside the model, predicted before it starts, so that a run that cannot fit ends at once.

A run goes from group to group: modules that read the same input, of d columns and r output rows together. It holds

    kept   tokens (d + hidden) * bytes of an activation                what the group reads, and the residual stream
           tokens hidden * bytes of an activation                      layer by layer: the residual stream alone
           and as much once more for the dense target, where d is that of the group before if the dense stream waits there
           (dense_stream.py), and hidden of routed experts: the dense model's inputs stay while they are pruned;
           where all that does not fit, d is that of the group before for the pruned model too (pruned_stream.py)
           masks and positions of attention                            which upstream's cache keeps from layer to layer

and beside that, one after the other, so that the largest counts:

    statistics   4 (d^2 + t + 2 c)     Hessian and cross moment (c numbers, with the dense target), each with that of a lane
                                       (of t numbers, pruning/lane_sum.py); a batch of inputs in float32; layer by layer those of
                                       all groups of the layer. Meanwhile batches run: of the layer (with copies of what is
                                       added), or in the dense stream, with the dense weights of the group before and a batch of
                                       inputs if it waited there.
    solving      4 (a d^2 + b r d)     Hessian, its factor, weights, the solver's buffers (step_memory.py)
    forward      of the largest batch: attention, or what the group's modules return; beside it, of the batches before it, what
                 the next group reads

and on a CPU where products go to oneDNN its code for experts' numbers of tokens, which stays (`MemoryNeed.code`). Here
no more than 4,096 tokens are converted at once, and solving counts as often as experts are solved at once. Between these
parts, and before operators with large results, freed memory is given back where the process has grown to 95 % of the largest of
them (freed_memory.py).
tests/llmcompressor/test_memory.py holds the prediction to the peak of all tensors; benchmarks/memory.py compares it with what a
process grows by.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.float32_products import CODE_OF_A_SHAPE, SIZES_PER_DOUBLING, onednn_is_faster
from rac_modifier.freed_memory import WITH_GAPS
from rac_modifier.llmcompressor.group_shape import GroupShape, saves_by_waiting, widens
from rac_modifier.llmcompressor.step_memory import Attention, SolverMemory
from rac_modifier.pruning import linalg
from rac_modifier.pruning.hessian import ROWS, block_columns, blocks_of_triangle, numbers_of_lane
from rac_modifier.pruning.sparsegpt import at_once
from rac_modifier.settings.entries import PruningEntry

FLOAT32, _CPU = 4, torch.device("cpu")


@dataclass(frozen=True)
class MemoryNeed:
    """What decides how much memory the groups of a run need.

    Attributes:
        tokens: with padding, of the whole calibration set.
        batch_tokens: with padding, of its largest batch.
        hidden: width of the residual stream.
        activation_bytes: of one number of an activation.
        by_layer: whether activations are kept between layers only, and not between groups.
        twice_before: groups before those that read so many columns run twice, so that the pruned model's wide inputs are not
            kept; 0: none does.
        solver: its steps.
        experts: the most routed experts of a layer, 0 where there are none.
        attention: of the model; nothing before the calibration set is there.
        attention_follows_all: whether attention may run after any group, because none of its modules is in one.
    """

    tokens: int
    batch_tokens: int
    hidden: int
    activation_bytes: int
    by_layer: bool
    solver: SolverMemory
    experts: int = 0
    attention: Attention = field(default_factory=Attention)
    attention_follows_all: bool = False
    twice_before: int = 0

    @classmethod
    def of(
        cls,
        entry: PruningEntry,
        loader: CalibrationLoader | None,
        model: PreTrainedModel,
        names: Collection[str],
        *,
        by_layer: bool,
        processes: int = 1,
    ) -> MemoryNeed:
        """What a recipe's entry needs in this process to prune the modules `names`.

        Without a `loader`, for its share of the tokens that are asked for.
        """
        embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        batches = (
            [(len(weights), weights.shape[1]) for weights in loader.token_weights] if loader else []
        )
        sizes = [rows * length for rows, length in batches]
        return cls(
            tokens=sum(sizes) or -(-entry.calibration.tokens // processes),
            batch_tokens=max(
                sizes, default=min(entry.calibration.tokens, entry.calibration.batch_tokens)
            ),
            hidden=embedding.shape[1],
            activation_bytes=embedding.element_size(),
            by_layer=by_layer,
            solver=SolverMemory(
                entry.solver,
                dense_target=entry.reconstruct == "dense" and not by_layer,
                refits=entry.refits,
                rounds=entry.quantization is not None,
                zero_points=entry.quantization is not None and entry.quantization.has_zero_points,
                float32=embedding.dtype == torch.float32,
            ),
            experts=max(
                (m.num_experts for m in model.modules() if isinstance(m, LinearExperts2D)),
                default=0,
            ),
            attention=Attention.of(
                model.config.get_text_config(), batches, embedding.element_size()
            ),
            attention_follows_all=not any("attn" in name or "attention" in name for name in names),
        )

    @property
    def dense_target(self) -> bool:
        """Whether the dense model's activations are kept beside the pruned model's."""
        return self.solver.dense_target

    def waits(self, group: GroupShape | None, after: GroupShape | None) -> bool:
        """Whether the dense stream does not run a group before the next one takes its statistics (dense_stream.py)."""
        return (
            self.dense_target and not self.by_layer and saves_by_waiting(group, after, self.tokens)
        )

    def runs_twice(self, group: GroupShape | None, after: GroupShape | None) -> bool:
        """Whether the pruned model runs a group once for the statistics of the next one, and again with it."""
        return not self.by_layer and widens(group, after, self.twice_before)

    def kept(self, group: GroupShape) -> int:
        """Bytes of activations that are kept while this group is pruned."""
        width = self.hidden if self.by_layer else self._columns(group) + self.hidden
        width += (self._dense_columns(group) + self.hidden) if self.dense_target else 0
        held = self.hidden if self.experts and self.dense_target else 0
        return self.tokens * (width + held) * self.activation_bytes + self.attention.kept

    def _columns(self, group: GroupShape) -> int:
        """Inputs that the pruned model is kept at while this group is pruned."""
        before = group.before
        return (
            before.columns
            if before is not None and self.runs_twice(before, group)
            else group.columns
        )

    def _dense_columns(self, group: GroupShape) -> int:
        """Inputs that the dense model is kept at, where its stream begins with this group or where that ends, if it is more."""
        before, after = group.before, group.after
        begins = before if before is not None and self.waits(before, group) else group
        ends = group if self.waits(group, after) else after or begins
        return max(begins.columns, ends.columns)

    def grows(self, group: GroupShape) -> int:
        """Bytes of activations more when the last batch runs: those before it have become what the next group reads."""
        if (
            self.by_layer
            or group.routed
            or group.after is None
            or self.runs_twice(group, group.after)
        ):
            return 0
        wider = max(group.after.columns - self._columns(group), 0)
        return max(self.tokens - self.batch_tokens, 0) * wider * self.activation_bytes

    def work(self, group: GroupShape, device: torch.device = _CPU) -> int:
        """Bytes that this group needs on `device` at its peak: of statistics, solver, or a forward pass."""
        return int(
            max(self.statistics(group, device), self.solving(group, device), self.forward(group))
        )

    def bytes_on(
        self, device: torch.device, onload: torch.device, offload: torch.device, group: GroupShape
    ) -> int:
        """Bytes of a process on `device`, where statistics and solver use `onload`, and activations are kept on `offload`."""
        # activations are kept with hardly any gaps, in blocks of a few sizes
        gaps, work = WITH_GAPS if device.type == "cpu" else 1.0, 0.0
        if device == onload:
            runs = gaps * self.forward(group) + (self.grows(group) if device == offload else 0)
            work = max(gaps * self.work(group, onload), runs)
        code = self.code(group, onload) if device == onload else 0
        return int(work) + code + (self.kept(group) if device == offload else 0)

    def code(self, group: GroupShape, device: torch.device = _CPU) -> int:
        """Of oneDNN's code for products of experts, gate with up and down: each has other numbers of tokens.

        Their Hessians block row by block row, a forward pass, and the cross moment (float32_products.py).
        """
        if not (group.routed and onednn_is_faster(device)):
            return 0
        each = len(blocks_of_triangle(group.columns)) + 1 + self.dense_target
        return int(CODE_OF_A_SHAPE * SIZES_PER_DOUBLING * 2 * each)

    def forward(self, group: GroupShape) -> int:
        """Of the largest batch, while the part of the model runs that the group begins; layer by layer the whole layer."""
        # the residual, its norm and what is added to it; gate and up with their product
        width = 3 * self.hidden + 1.5 * group.rows
        modules = int(self.batch_tokens * width * self.activation_bytes)
        before_attention = (
            group.columns == self.hidden and ".mlp." not in group.name
        )  # q, k and v, or o
        attends = self.by_layer or self.attention_follows_all or before_attention
        here = max(modules, self.attention.peak if attends else 0)
        if group.before is None or not self.runs_twice(group.before, group):
            return here
        return max(self.forward(group.before), here + self.inputs(group))

    def inputs(self, group: GroupShape) -> int:
        """Bytes of what a group reads in the largest batch."""
        return self.batch_tokens * group.columns * self.activation_bytes

    def statistics(self, group: GroupShape, device: torch.device = _CPU) -> int:
        """Of sums, while batches are added and run."""
        d, dense = group.columns, int(self.dense_target)
        cross = dense * d * (d if group.rows >= d / 2 else group.rows)
        product = 0.5 * cross if linalg.bf16_is_fast(device) else 0.0
        sums = FLOAT32 * (d**2 + numbers_of_lane(d) + 2 * cross) + group.summed
        inputs = FLOAT32 * (min(self.batch_tokens, ROWS) * d * (2 + 2 * dense) + product)
        together = self.together(group, device)
        if not self.by_layer:  # of experts that are solved with this one
            sums += FLOAT32 * (together - 1) * (d**2 + cross)
        here = self.by_layer or (dense and not group.routed and not self.waits(group, group.after))
        runs = self.forward(group) if here else 0
        if group.before is not None and self.waits(group.before, group):
            sums += self.weights(group.before) + self.inputs(group)
            runs = max(runs, self.forward(group.before))
        if group.before is not None and self.runs_twice(group.before, group):
            sums += self.inputs(group)
            runs = max(runs, self.forward(group.before))
        return int(sums + max(inputs, runs + (self.copies(group, device) if self.by_layer else 0)))

    def weights(self, group: GroupShape) -> int:
        """Bytes of the weights of a group."""
        return group.columns * group.rows * self.activation_bytes

    def copies(self, group: GroupShape, device: torch.device = _CPU) -> int:
        """Of the inputs of a batch, input by input, and of a block row of its sum, where products take these (hessian.py)."""
        tokens = min(self.batch_tokens, ROWS // 2) + block_columns(group.columns)
        return FLOAT32 * tokens * group.columns if onednn_is_faster(device) else 0

    def solving(self, group: GroupShape, device: torch.device = _CPU) -> int:
        """Of the solver's largest step."""
        together = self.together(group, device)
        # of those that wait: a Hessian and a factor, and what they were given or have become
        waiting = (together - 1) * (2 * group.columns**2 + 3 * group.columns * group.rows)
        most = 0.0
        solver = replace(self.solver, bf16=linalg.bf16_is_fast(device))
        for name, numbers in solver.steps(group.columns, group.rows).items():
            at_once = self.solver.solver == "sparsegpt" or name == "rounding"
            most = max(most, together * numbers if at_once else numbers + waiting)
        left = self.weights(group) if self.waits(group, group.after) else 0
        return int(group.beside + left + FLOAT32 * most)

    def together(self, group: GroupShape, device: torch.device) -> int:
        """How many groups like this one are solved at once."""
        if self.solver.solver != "sparsegpt" and not self.solver.rounds:
            return 1
        alike = group.alike or (1 if self.by_layer else max(self.experts, 1))
        return min(at_once(group.columns, group.rows, device), alike)
