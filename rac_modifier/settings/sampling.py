"""What a user sets about sampling: the distribution, the prompt, and the servers that sample."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator, model_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.base import Settings

Template = Literal["chat", "none"]
DEFAULT_TEMPERATURE, DEFAULT_TOP_P, DEFAULT_TOP_K = 0.6, 0.95, 0


class SamplingSettings(Settings):
    """How completions are sampled. None: as in the model's own generation_config (see `resolved`).

    Only temperature, top_k and top_p shape the distribution. A repetition penalty in the model's generation_config is
    not applied, and a warning says so.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    temperature: float | None = Field(
        None,
        ge=0,
        description="0 is greedy; default: that of the model's generation_config, else 0.6",
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="sample among the most likely tokens that hold this share; default: the model's, else 0.95",
    )
    top_k: int | None = Field(
        None,
        ge=0,
        description="sample among this many most likely tokens, 0: no limit; default: the model's, else 0",
    )
    max_new_tokens: int = Field(8192, ge=1, description="a completion is cut at this many tokens")
    samples_per_problem: int = Field(1, ge=1, description="completions per problem")
    batch_size: int = Field(
        64,
        ge=1,
        description="completions sampled at once in this process; does not change what is sampled",
    )
    seed: int = Field(0, description="decides the order of the problems and every draw")
    system_prompt: str | None = Field(
        None, description="system message before each question; default: none"
    )
    template: Template = Field(
        "chat",
        description="chat: the tokenizer's chat template; none: the question alone, for a model without one",
    )
    thinking: bool = Field(
        True,
        description="the enable_thinking of the chat template; a template without this switch ignores it",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> SamplingSettings:
        if self.temperature == 0 and self.samples_per_problem > 1:
            raise RacError(
                f"samples_per_problem={self.samples_per_problem} at temperature 0 would give the same completion each "
                "time; use samples_per_problem=1 or a temperature above 0"
            )
        if self.template == "none" and self.system_prompt is not None:
            raise RacError(
                "template='none' has no place for a system_prompt; drop it or use template='chat'"
            )
        return self

    def resolved(self, generation_config: Any) -> SamplingSettings:
        """These settings with a value for each that is None.

        The value comes from the model's generation_config if that one samples (do_sample) and has it; else it is usual
        for reasoning models: temperature 0.6, top_p 0.95, top_k off. (transformers' own defaults, such as top_k=50, are
        not used.)
        """
        usual: dict[str, Any] = {
            "temperature": DEFAULT_TEMPERATURE,
            "top_p": DEFAULT_TOP_P,
            "top_k": DEFAULT_TOP_K,
        }
        own = (
            generation_config
            if generation_config is not None and generation_config.do_sample
            else None
        )
        filled = self.model_dump()
        for name, default in usual.items():
            if filled[name] is None:
                value = getattr(own, name, None)
                filled[name] = default if value is None else value
        return SamplingSettings(**filled)


class EngineSettings(Settings):
    """OpenAI-compatible servers that sample the traces, each with the model that is to be compressed."""

    model_config = ConfigDict(allow_inf_nan=False)

    base_urls: tuple[str, ...] = Field(
        description="addresses of the servers, such as http://127.0.0.1:8000/v1; each request is sent to the least busy one"
    )
    model: str | None = Field(
        None, description="name under which the model is served; default: the only one served"
    )
    concurrency: int = Field(
        64, ge=1, le=4096, description="completions in progress at once, over all servers"
    )
    timeout: float = Field(
        600, gt=0, description="seconds per completion, after which it is requested again"
    )
    tries: int = Field(
        9, ge=1, description="requests per completion, after which its problem counts as failed"
    )
    verify_model: bool = Field(
        True,
        description="compare a few greedy tokens of each server with the model to be compressed",
    )
    api_key_env: str | None = Field(
        None,
        description="environment variable that holds the servers' API key; default: no key is sent",
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
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise RacError(
            f"base_urls: {url!r} is no address of a server; write it like http://127.0.0.1:8000/v1"
        )
    if parts.username or parts.password:
        raise RacError(
            "base_urls: an address holds a user name or password; name a variable with api_key_env instead"
        )
    return url.rstrip("/") + ("/v1" if not parts.path.strip("/") else "")
