"""How a question becomes a prompt: the settings that calibration and evaluation must share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from rac_modifier.settings.sampling import SamplingSettings, Template


class PromptSettings(BaseModel):
    """The part of `SamplingSettings` that decides the prompt's tokens; the defaults are the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: Template = "chat"
    system_prompt: str | None = None
    thinking: bool = True

    @classmethod
    def of(cls, sampling: SamplingSettings) -> PromptSettings:
        """The prompt settings among those of sampling."""
        return cls(
            template=sampling.template,
            system_prompt=sampling.system_prompt,
            thinking=sampling.thinking,
        )

    def describe(self) -> str:
        """For example "chat template, no system prompt, thinking on"; equal where the prompts are the same."""
        if self.template == "none":
            return "the bare question, without a template"
        system = (
            f"system prompt {self.system_prompt!r}"
            if self.system_prompt is not None
            else "no system prompt"
        )
        return f"chat template, {system}, thinking {'on' if self.thinking else 'off'}"
