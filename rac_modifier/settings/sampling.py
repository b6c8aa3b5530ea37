"""What a user sets about sampling: the distribution, the prompt, and the servers that sample."""

from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.check import Batch, Count, Seed, Settings

Template = Literal["chat", "none"]
_DEFAULTS = {"temperature": 0.6, "top_p": 0.95, "top_k": 0}
_EXAMPLE = "http://127.0.0.1:8000/v1"


class SamplingSettings(Settings):
    """How completions are sampled. None: as in the model's own generation_config (see `resolved`).

    Only temperature, top_k and top_p shape the distribution, no repetition penalty.
    """

    temperature: float | None = Field(None, ge=0, le=100)
    """0 is greedy; default: that of the model's generation_config, else 0.6."""

    top_p: float | None = Field(None, gt=0, le=1)
    """Sample among the most likely tokens that hold this share; default: the model's, else 0.95."""

    top_k: int | None = Field(None, ge=0, le=10**9)
    """Sample among this many most likely tokens, 0: no limit; default: the model's, else 0."""

    max_new_tokens: Count = 8192
    """A completion is cut at this many tokens."""

    samples_per_problem: Batch = 1
    """Completions per problem."""

    batch_size: Batch = 64
    """Completions sampled at once in this process; does not change what is sampled."""

    seed: Seed = 0
    """Decides the order of the problems and every draw."""

    system_prompt: str | None = None
    """System message before each question; default: none."""

    template: Template = "chat"
    """chat: the tokenizer's chat template; none: the question alone, for a model without one."""

    thinking: bool = True
    """The enable_thinking or thinking of the chat template; one without a switch ignores it."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.temperature == 0 and self.samples_per_problem > 1:
            raise RacError(
                f"{self.samples_per_problem} samples per problem at temperature 0 would be the "
                "same completion each time; ask for one, or set a temperature above 0"
            )
        if self.template == "none" and self.system_prompt is not None:
            raise RacError("template='none' has no system_prompt; drop it or use template='chat'")
        return self

    def resolved(self, generation_config: Any) -> Self:
        """Return these settings with a value for each that is None.

        The model's generation_config decides, if it samples (do_sample) and has the value.
        """
        samples = generation_config is not None and generation_config.do_sample
        filled = self.model_dump()
        for name, default in _DEFAULTS.items():
            if filled[name] is None:
                value = getattr(generation_config, name, None) if samples else None
                filled[name] = default if value is None else value
        return type(self)(**filled)


class PromptSettings(Settings):
    """The part of `SamplingSettings` that decides a prompt's tokens; evaluation shares it."""

    template: Template = "chat"
    system_prompt: str | None = None
    thinking: bool = True

    @classmethod
    def of(cls, sampling: SamplingSettings) -> Self:
        """Return the prompt settings among the settings of sampling."""
        return cls(**sampling.model_dump(include={"template", "system_prompt", "thinking"}))

    def describe(self) -> str:
        """Return for example "chat template, no system prompt, thinking on"."""
        if self.template == "none":
            return "the bare question, without a template"
        prompt = self.system_prompt
        system = "no system prompt" if prompt is None else f"system prompt {prompt!r}"
        return f"chat template, {system}, thinking {'on' if self.thinking else 'off'}"


class EngineSettings(Settings):
    """OpenAI-compatible servers that sample the traces, each with the model to be compressed."""

    base_urls: list[str]
    """Addresses of the servers, such as http://127.0.0.1:8000/v1; the least busy one is asked."""

    model: str | None = None
    """Name under which the model is served; default: the only one served."""

    concurrency: int = Field(64, ge=1, le=4096)
    """Completions in progress at once, over all servers."""

    timeout: float = Field(600, gt=0, le=10**6)
    """Seconds per completion, after which it is requested again."""

    verify_model: bool = True
    """Compare a few greedy tokens of each server with the model to be compressed."""

    api_key_env: str | None = None
    """Environment variable that holds the servers' API key; default: no key is sent."""

    @field_validator("base_urls")
    @classmethod
    def _are_urls(cls, urls: list[str]) -> list[str]:
        if not urls:
            raise RacError(f"base_urls is empty; name a server, such as {_EXAMPLE}")
        return list(dict.fromkeys(map(_normal, urls)))


def _normal(url: str) -> str:
    """Return an address as the client takes it (RacError: no address, or one with a password)."""
    try:
        address = urlsplit(url)
        valid = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:
        valid = False
    # urlsplit reads over line ends, which would end a header
    problem = None
    if not valid or address.query or address.fragment or not url.isprintable() or " " in url:
        problem = f"{url!r} is no address of a server; write it like {_EXAMPLE}"
    elif address.username or address.password:
        problem = "an address holds a user name or password; name a variable with api_key_env"
    if problem is not None:
        raise RacError(f"base_urls: {problem}")
    return url.rstrip("/") + ("/v1" if not address.path.strip("/") else "")
