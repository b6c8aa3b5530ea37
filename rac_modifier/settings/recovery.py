"""What a user sets about recovery: how long the kept weights are trained, and on what."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class RecoverySettings(BaseModel):
    """Training of the kept weights towards the dense model's predictions after pruning, with the mask fixed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tokens: int = Field(
        65_536,
        ge=1,
        description="prompt and completion tokens of the traces to train on; calibration does not use these traces, and "
        "missing ones are sampled",
    )
    passes: int = Field(1, ge=1, le=16, description="passes over those traces; more than two overfit a small set")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="the highest learning rate; default: by model size, 2e-4 at 135 M parameters, 3.6e-5 at 7 B",
    )
    step_tokens: int = Field(2048, ge=64, description="tokens per optimizer step, about")
    batch_tokens: int = Field(4096, ge=64, description="padded tokens per forward and backward pass at most")
    held_out_tokens: int = Field(
        8192, ge=64, description="tokens of further traces, on which it is decided which weights are kept"
    )
    seed: int = Field(0, ge=0, description="shuffles the traces")
