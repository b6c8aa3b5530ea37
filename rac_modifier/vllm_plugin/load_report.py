"""The text that is logged once at load.

How many layers run on which kernel, and why the others do not.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vllm.logger import init_logger

from rac_modifier.kernels.interface import Decision
from rac_modifier.vllm_plugin import METHOD

logger = init_logger(f"vllm.{__name__}")


@dataclass
class LoadReport:
    """Collect the decisions of one model's layers, and log them with the last of the `expected` layers.

    requested: the user gave `--quantization rac`, so a model without a layer on a kernel is a warning.
    """

    requested: bool = False
    expected: int = 0
    decisions: dict[str, Decision] = field(default_factory=dict)

    def expect(self) -> None:
        """Count one more layer that will be decided after loading."""
        self.expected += 1

    def leave(self, layer: str, reason: str) -> None:
        """Record that vLLM's own method runs a layer."""
        self.expect()
        reason = f"vLLM's own method because {reason}"
        self.decisions[layer] = Decision(False, "vLLM", reason, 1.0, 1.0)

    def add(self, layer: str, decision: Decision | None) -> None:
        """Record a layer's decision, and log all of them if it is the last one.

        None: the layer is not compressed.
        """
        if decision is None:
            self.expected -= 1
        else:
            self.decisions[layer] = decision
        if not self.decisions or len(self.decisions) < self.expected:
            return
        if self.requested and not any(other.sparse for other in self.decisions.values()):
            no_effect = f"--quantization {METHOD} has no effect on this model here; leave it out"
            logger.warning("%s\n  %s", self.render(), no_effect)
        else:
            logger.info("%s", self.render())

    def render(self) -> str:
        """Return one line per kernel, and one per reason not to use a kernel."""
        sparse = [decision for decision in self.decisions.values() if decision.sparse]
        lines = [f"rac: {len(sparse)} of {len(self.decisions)} compressed layers run on a kernel"]
        for kernel, count in Counter(decision.kernel for decision in sparse).items():
            of_kernel = [decision for decision in sparse if decision.kernel == kernel]
            sizes = [decision.bytes_per_weight for decision in of_kernel]
            gain = max(decision.ceiling for decision in of_kernel)
            lines.append(
                f"  {kernel}: {_layers(count)}, {min(sizes):.2f}-{max(sizes):.2f} bytes per weight,"
                f" at most {gain:.2f}x faster"
            )
        reasons = {name: d.reason for name, d in self.decisions.items() if not d.sparse}
        for reason, count in Counter(reasons.values()).items():
            example = next(name for name, text in reasons.items() if text == reason)
            lines.append(f"  {reason}: {_layers(count)}, such as {example}")
        return "\n".join(lines)


def _layers(count: int) -> str:
    return f"{count} layer" + ("s" if count != 1 else "")
