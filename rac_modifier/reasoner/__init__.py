"""A small genuine reasoning model that ships with the package, and the problems it solves."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def reasoner_path() -> Path:
    """The folder of the embedded reasoner, for `from_pretrained`.

    Raises:
        RacError: the weights are not there (a source tree in which they were never trained).
    """
    folder = Path(str(resources.files(__name__))) / "assets"
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise RacError(
            f"the embedded reasoner is missing from {folder}; train it (about half an hour on two cores) with: "
            f"python training/train_reasoner.py --out {folder}"
        )
    return folder


def direct_answer_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Prompt ids whose thinking is already over and empty (`<think>\\n</think>\\n`): the model must answer at once.

    A model that keeps its accuracy under this prompt does not need its chain of thought.

    Raises:
        RacError: the chat template's generation prompt does not open the thinking.
    """
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    if not str(text).endswith("<think>\n"):
        raise RacError(
            f"the chat template's prompt ends in {str(text)[-20:]!r}, not in '<think>\\n', so its thinking cannot be "
            "closed; use a model whose template opens the thinking"
        )
    return list(tokenizer(f"{text}</think>\n", add_special_tokens=False)["input_ids"])
