"""The text that is logged once at load: how many layers run on which kernel, and why the others stay dense."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rac_modifier.kernels.interface import Decision


@dataclass
class Summary:
    """The decisions of one model's layers. `add` returns the text to log with the last of the `expected` layers.

    `layers` and `kernel`: what the first line calls them.
    """

    expected: int = 0
    layers: str = "pruned layers"
    kernel: str = "a sparse kernel"
    decisions: dict[str, Decision] = field(default_factory=dict)

    def expect(self) -> None:
        """Count one more layer that will be decided."""
        self.expected += 1

    def add(self, layer: str, decision: Decision) -> str | None:
        """Record a layer's decision; the text to log if it is the last one."""
        self.decisions[layer] = decision
        return self.render() if len(self.decisions) == self.expected else None

    def render(self) -> str:
        """One line per kernel, and one per reason not to use one."""
        sparse = [d for d in self.decisions.values() if d.sparse]
        lines = [f"rac: {len(sparse)} of {len(self.decisions)} {self.layers} run on {self.kernel}"]
        for kernel, count in Counter(d.kernel for d in sparse).items():
            of_kernel = [d for d in sparse if d.kernel == kernel]
            low, high = (
                min(d.bytes_per_weight for d in of_kernel),
                max(d.bytes_per_weight for d in of_kernel),
            )
            gain = max(d.ceiling for d in of_kernel)
            lines.append(
                f"  {kernel}: {_layers(count)}, {low:.2f}-{high:.2f} bytes per weight, at most {gain:.2f}x faster"
            )
        for reason, count in Counter(
            d.reason for d in self.decisions.values() if not d.sparse
        ).items():
            first = next(name for name, d in self.decisions.items() if d.reason == reason)
            lines.append(f"  {reason}: {_layers(count)}, such as {first}")
        return "\n".join(lines)


def _layers(count: int) -> str:
    return f"{count} layer" + ("s" if count != 1 else "")
