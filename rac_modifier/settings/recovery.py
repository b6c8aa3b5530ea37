"""What a user sets about recovery: how long the kept weights are trained, and on what."""

from typing import Annotated

from pydantic import Field

from rac_modifier.settings.check import Count, Settings

_Tokens = Annotated[Count, Field(ge=64)]


class RecoverySettings(Settings):
    """Training of the kept weights towards the dense model's predictions after pruning."""

    tokens: Count = 131_072
    """Prompt and completion tokens of the traces to train on; calibration does not use these."""

    passes: int = Field(1, ge=1, le=16)
    """Passes over the traces; more than two overfit a small set."""

    learning_rate: float | None = Field(None, gt=0, le=1)
    """The highest learning rate; default: by model size, 2e-4 at 135 M, 3.6e-5 at 7 B."""

    step_tokens: _Tokens = 512
    """Tokens per optimizer step, about. Processes share them: raise it with their number."""

    batch_tokens: _Tokens = 4096
    """Padded tokens per forward and backward pass at most."""

    held_out_tokens: _Tokens = 8192
    """Tokens of further traces; their loss decides which weights are kept."""

    folder: str | None = None
    """Folder of the dense model's hidden states and of the state that a killed run goes on from;
    it is removed at the end; default: a folder under rac_recovery/."""

    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass: less memory, a third more time,
    the same result."""

    @property
    def reserved_tokens(self) -> int:
        """Return the tokens of the traces for recovery, held-out ones included."""
        return self.tokens + self.held_out_tokens
