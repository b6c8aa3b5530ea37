"""What a user sets about the servers that sample traces."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rac_modifier.errors import RacError


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
