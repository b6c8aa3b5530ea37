"""A small genuine reasoning model that ships with the package, and the problems it solves."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def reasoner_path() -> Path:
    """Return the folder of the embedded reasoner, for `from_pretrained`.

    Raises:
        RacError: the weights are missing (a source tree in which they were not trained).
    """
    folder = Path(str(resources.files(__name__))) / "assets"
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise RacError(
            f"the embedded reasoner is missing from {folder}; train it (about half an hour "
            f"on two cores) with: python training/train_reasoner.py --out {folder}"
        )
    return folder


def direct_answer_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, system_prompt: str | None = None
) -> list[int]:
    """Return prompt ids with an empty thinking, so that the model must answer directly.

    A model that keeps its accuracy with this prompt does not need its chain of thought.

    Raises:
        RacError: the chat template's generation prompt does not open the thinking.
    """
    messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    messages.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not str(text).endswith("<think>\n"):
        raise RacError(
            f"the chat template's prompt ends in {str(text)[-20:]!r}, not in '<think>\\n', so the "
            "thinking cannot be closed; use a model whose template opens the thinking"
        )
    return list(tokenizer(f"{text}</think>\n", add_special_tokens=False)["input_ids"])
