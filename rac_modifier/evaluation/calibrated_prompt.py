"""Prompt settings of an evaluation: the settings of the models' calibration."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from transformers.utils.hub import cached_file

from rac_modifier.checkpoint.card import RUN_RECORD_NAME
from rac_modifier.errors import RacError
from rac_modifier.runtime.files import read_json
from rac_modifier.settings.sampling import PromptSettings, Template

# Of one model, by part of its calibration set.
Prompts = Mapping[str, PromptSettings]


def recorded_prompts(source: str) -> Prompts | None:
    """Read the run record of a folder or hub id (RacError: it is damaged); None: there is none."""
    path = cached_file(
        source,
        RUN_RECORD_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    recorded = read_json(path).get("prompts") or {}
    try:
        return {part: PromptSettings(**settings) for part, settings in recorded.items()}
    except (AttributeError, TypeError, ValidationError) as error:
        raise RacError(
            f"{path}: unreadable prompt settings {recorded!r}; restore the file, or remove it"
        ) from error


def choose_prompt(
    recorded: Mapping[str, Prompts | None],
    *,
    template: Template | None = None,
    system_prompt: str | None = None,
    thinking: bool | None = None,
) -> tuple[PromptSettings, list[str]]:
    """Choose the prompt settings for all models: None takes the recorded value (RacError: several).

    Also return lines that describe them, and models that were calibrated with others.
    """
    by_name = {
        f"{model} ({part})" if len(prompts) > 1 else model: prompt
        for model, prompts in recorded.items()
        if prompts
        for part, prompt in prompts.items()
    }

    def value(field: str, option: Any) -> Any:
        values = {getattr(prompt, field): name for name, prompt in by_name.items()}
        if option is None and len(values) > 1:
            prompts = "; ".join(f"{name}: {by_name[name].describe()}" for name in values.values())
            raise RacError(
                "calibrated with different prompts, and all models must be asked with the same "
                f"({prompts}); choose it with --{field.replace('_', '-')}"
            )
        default = PromptSettings.model_fields[field].default
        return next(iter(values), default) if option is None else option

    if value("template", template) == "none":
        chosen = PromptSettings(template="none", system_prompt=system_prompt or None)
    else:
        system, thinks = value("system_prompt", system_prompt), value("thinking", thinking)
        chosen = PromptSettings(system_prompt=system or None, thinking=thinks)
    differences = [
        f"{name} was calibrated with another prompt: {prompt.describe()}."
        for name, prompt in by_name.items()
        if prompt.describe() != chosen.describe()
    ]
    return chosen, [f"Prompt: {chosen.describe()}.", *differences]
