"""What a user sets about sampling: the distribution, the prompt, and the servers that sample."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rac_modifier.errors import RacError

Template = Literal["chat", "none"]
DEFAULT_TEMPERATURE, DEFAULT_TOP_P, DEFAULT_TOP_K = 0.6, 0.95, 0


class SamplingSettings(BaseModel):
    """How completions are sampled; None means as the model's own generation_config says (see `resolved`).

    Only temperature, top_k and top_p shape the distribution: a repetition penalty in the model's generation_config is
    not applied (a warning says so).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float | None = Field(default=None, ge=0, description="0 is greedy")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, description="0 is off")
    max_new_tokens: int = Field(default=8192, ge=1)
    samples_per_problem: int = Field(default=1, ge=1)
    batch_size: int = Field(
        default=64, ge=1, description="completions sampled together; does not change what is sampled"
    )
    seed: int = 0
    system_prompt: str | None = None
    template: Template = Field(default="chat", description="'none' gives the model the bare question")
    thinking: bool = Field(
        default=True, description="the chat template's enable_thinking, where it knows the switch (Qwen3)"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> SamplingSettings:
        if self.temperature == 0 and self.samples_per_problem > 1:
            raise RacError(
                f"samples_per_problem={self.samples_per_problem} at temperature 0 would give the same completion each "
                "time; use samples_per_problem=1 or a temperature above 0"
            )
        if self.template == "none" and self.system_prompt is not None:
            raise RacError("template='none' has no place for a system_prompt; drop it or use template='chat'")
        return self

    def resolved(self, generation_config: Any) -> SamplingSettings:
        """These settings with nothing left open.

        What is None comes from the model's generation_config if that one samples (do_sample), and where it is silent
        too, from the usual settings of reasoning models: temperature 0.6, top_p 0.95, top_k off. (Not from
        transformers' own defaults, of which top_k=50 would be one.)
        """
        usual: dict[str, Any] = {"temperature": DEFAULT_TEMPERATURE, "top_p": DEFAULT_TOP_P, "top_k": DEFAULT_TOP_K}
        own = generation_config if generation_config is not None and generation_config.do_sample else None
        filled = self.model_dump()
        for name, default in usual.items():
            if filled[name] is None:
                value = getattr(own, name, None)
                filled[name] = default if value is None else value
        return SamplingSettings(**filled)


class EngineSettings(BaseModel):
    """OpenAI-compatible servers that sample the traces, all serving the model that is to be compressed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    base_urls: tuple[str, ...] = Field(
        description="where the servers listen, such as http://127.0.0.1:8000/v1; requests go to the least busy one"
    )
    model: str | None = Field(None, description="name that the model is served under; default: the only one served")
    concurrency: int = Field(64, ge=1, le=4096, description="completions under way at once, over all servers")
    timeout: float = Field(600, gt=0, description="seconds that one completion may take before it is tried again")
    tries: int = Field(9, ge=1, description="how often a completion is tried before its problem counts as failed")
    verify_model: bool = Field(
        True, description="compare a few greedy tokens of each server with the model to be compressed"
    )
    api_key_env: str | None = Field(
        None, description="environment variable that holds the servers' API key; default: no key is sent"
    )

    @field_validator("base_urls")
    @classmethod
    def _are_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        if not urls:
            raise RacError(
                "base_urls is empty; name at least one server, such as http://127.0.0.1:8000/v1, or leave engine out"
            )
        normal = tuple(dict.fromkeys(map(_normal, urls)))
        if len(normal) < len(urls):
            raise RacError(f"base_urls names a server twice: {', '.join(urls)}; name each once")
        return normal


def _normal(url: str) -> str:
    parts = urlsplit(url)
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise RacError(f"base_urls: {url!r} is no address of a server; write it like http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise RacError("base_urls: an address holds a user name or password; name a variable with api_key_env instead")
    return url.rstrip("/") + ("/v1" if not parts.path.strip("/") else "")
