"""Prompt settings of an evaluation: the settings of the models' calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loguru import logger
from pydantic import ValidationError
from transformers.utils.hub import cached_file

from rac_modifier.checkpoint.record import RUN_RECORD_NAME
from rac_modifier.errors import RacError
from rac_modifier.files import read_json
from rac_modifier.settings.sampling import PromptSettings, Template

# Of one model, by part of its calibration set.
Prompts = Mapping[str, PromptSettings]


@dataclass(frozen=True)
class PromptChoice:
    """The prompt settings for all models, and a line per model calibrated with others."""

    prompt: PromptSettings
    differences: tuple[str, ...]

    def describe(self) -> str:
        """Describe the prompt and each difference from the calibration, a line each."""
        return "\n".join([f"Prompt: {self.prompt.describe()}.", *self.differences])


def recorded_prompts(source: str) -> Prompts | None:
    """Read a model's run record; None where there is none, as for a dense model.

    Args:
        source: a model folder or a Hugging Face id.

    Raises:
        RacError: the run record is damaged.
    """
    path = cached_file(
        source,
        RUN_RECORD_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    recorded = read_json(path).get("prompts")
    if recorded is None:
        logger.warning(
            f"{path} does not record the prompt settings of the calibration; the defaults are used"
        )
        return None
    try:
        return {part: PromptSettings(**settings) for part, settings in recorded.items()}
    except (AttributeError, TypeError, ValidationError) as error:
        raise RacError(
            f"{path}: its prompt settings cannot be read ({recorded!r}); restore the file, or "
            "remove it to evaluate without it"
        ) from error


def choose_prompt(
    recorded: Mapping[str, Prompts | None],
    *,
    template: Template | None = None,
    system_prompt: str | None = None,
    thinking: bool | None = None,
) -> PromptChoice:
    """Choose the prompt settings for all models: None takes the recorded value of a setting.

    `recorded`: `recorded_prompts` by model. An empty system prompt is none.

    Raises:
        RacError: several recorded values and none from the caller; a system prompt or `thinking`
            without a template.
    """
    by_name = {
        f"{model} ({part})" if len(prompts) > 1 else model: prompt
        for model, prompts in recorded.items()
        if prompts
        for part, prompt in prompts.items()
    }
    if (template or _only("template", by_name)) == "none":
        if system_prompt:
            raise RacError(
                f"system prompt {system_prompt!r} has no place without a chat template; leave "
                "--system-prompt out, or use --template chat"
            )
        if thinking is not None:
            raise RacError(
                "--thinking and --no-thinking are for a chat template, and the questions are asked "
                "without one; leave them out, or use --template chat"
            )
        chosen = PromptSettings(template="none")
    else:
        system = _only("system_prompt", by_name) if system_prompt is None else system_prompt
        thinks = _only("thinking", by_name) if thinking is None else thinking
        chosen = PromptSettings(template="chat", system_prompt=system or None, thinking=thinks)
    differences = (
        f"{name} was calibrated with another prompt: {prompt.describe()}."
        for name, prompt in by_name.items()
        if prompt.describe() != chosen.describe()
    )
    return PromptChoice(chosen, tuple(differences))


def _only(field: str, by_name: Prompts) -> Any:
    """Return the recorded value of a field, or its default; refuse several values."""
    values = {getattr(prompt, field): name for name, prompt in by_name.items()}
    if len(values) > 1:
        option = {"thinking": "--thinking or --no-thinking"}.get(
            field, f"--{field.replace('_', '-')}"
        )
        prompts = "; ".join(f"{name}: {by_name[name].describe()}" for name in values.values())
        raise RacError(
            "calibrated with different prompts, and all models must be asked with the same "
            f"({prompts}); choose it with {option}"
        )
    return next(iter(values), PromptSettings.model_fields[field].default)
