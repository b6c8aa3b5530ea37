"""The shapes of the models of scale_estimate.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rac_modifier.frontier.compressing import Group
from rac_modifier.frontier.estimate import ModelShape


@dataclass(frozen=True)
class Model:
    """The shape of a model. With `experts` per layer, `chosen` of them for each token; `everywhere`: each gets every token."""

    name: str
    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    vocabulary: int
    experts: int = 0
    chosen: int = 0
    everywhere: bool = False

    @property
    def hidden_size(self) -> int:
        """This and the next as in a config of transformers."""
        return self.hidden

    @property
    def num_attention_heads(self) -> int:
        """Of 128 numbers each."""
        return self.queries // self.head_dim

    @property
    def num_key_value_heads(self) -> int:
        """Likewise."""
        return self.keys // self.head_dim

    head_dim = 128

    def layer(self) -> Iterator[Group]:
        """The groups of a layer."""
        yield Group(self.hidden, (self.queries, self.keys, self.keys))
        yield Group(self.queries, (self.hidden,))
        share = self.chosen / self.experts if self.experts and not self.everywhere else 1.0
        for _ in range(max(self.experts, 1)):
            yield Group(self.hidden, (self.inner, self.inner), share)
            yield Group(self.inner, (self.hidden,), share)

    @property
    def shape(self) -> ModelShape:
        """For the estimate of sampling, in which the router alone decides who computes."""
        attention, experts = self._weights()
        other = 2 * self.vocabulary * self.hidden
        per_token = experts * self.chosen // self.experts if self.experts else experts
        return ModelShape(
            parameters=self.layers * (attention + experts) + other,
            groups=tuple(self.layer()) * self.layers,
            layers=self.layers,
            hidden=self.hidden,
            kv_bytes=2 * 2 * self.layers * self.keys,
            active=self.layers * (attention + per_token) + other,
        )

    def _weights(self) -> tuple[int, int]:
        groups = list(self.layer())
        return sum(group.weights for group in groups[:2]), sum(
            group.weights for group in groups[2:]
        )


QWEN3_235B = (94, 4096, 1536, 64 * 128, 4 * 128, 151_936, 128, 8)
MODELS = (
    Model("7B", 28, 3584, 18944, 3584, 512, 152_064),
    Model("32B", 64, 5120, 27648, 5120, 1024, 152_064),
    Model("70B", 80, 8192, 28672, 8192, 1024, 128_256),
    Model("235B MoE", *QWEN3_235B),
    Model("235B MoE, all tokens to all experts", *QWEN3_235B, everywhere=True),
)
