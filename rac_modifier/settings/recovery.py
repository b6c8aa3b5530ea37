"""What a user sets about recovery: how long the kept weights are trained, and on what."""

from __future__ import annotations

from pydantic import Field

from rac_modifier.settings.base import Settings
from rac_modifier.settings.calibration import GenericText


class RecoverySettings(Settings):
    """Training of the kept weights towards the dense model's predictions after pruning, with the mask fixed."""

    tokens: int = Field(
        131_072,
        ge=1,
        description="prompt and completion tokens of the traces to train on; calibration does not use these traces, and "
        "missing ones are sampled",
    )
    generic_share: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="share of generic text in tokens, for a model that has other work than reasoning too",
    )
    generic: GenericText = Field(
        GenericText(), description="that text; training towards the dense model's predictions on it"
    )
    passes: int = Field(
        1, ge=1, le=16, description="passes over those traces; more than two overfit a small set"
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="the highest learning rate; default: by model size, 2e-4 at 135 M parameters, 3.6e-5 at 7 B",
    )
    step_tokens: int = Field(2048, ge=64, description="tokens per optimizer step, about")
    batch_tokens: int = Field(
        4096, ge=64, description="padded tokens per forward and backward pass at most"
    )
    held_out_tokens: int = Field(
        8192,
        ge=64,
        description="tokens of further traces, on which it is decided which weights are kept",
    )
    folder: str | None = Field(
        None,
        description="folder for the dense model's hidden states and for the state that a killed run goes on from; it is removed "
        "at the end; default: a folder under rac_recovery/ named after the model",
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep the inputs of each layer alone, and compute its activations again in the backward pass: less memory "
        "per token of a batch, a third more time, and the same result",
    )
    seed: int = Field(0, ge=0, description="shuffles the traces, and the generic text")

    @property
    def reserved_tokens(self) -> int:
        """Tokens of the traces that calibration has to leave for recovery, held-out ones included."""
        return self.tokens - self.generic_tokens + self.held_out_tokens

    @property
    def generic_tokens(self) -> int:
        """Tokens of generic text to train on."""
        return round(self.tokens * self.generic_share)
