"""Load any checkpoint of this package, packed or not, and raise where transformers only warns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import check_packed
from rac_modifier.checkpoint.output_folder import check_is_id
from rac_modifier.checkpoint.sparsity_config import CONFIG_FILE, packed_format
from rac_modifier.errors import RacError
from rac_modifier.files import read_json


def load_model(
    model: str | Path, *, trust_remote_code: bool = False, **from_pretrained_kwargs: Any
) -> PreTrainedModel:
    """Load a model as `AutoModelForCausalLM.from_pretrained` does, packed or not, but strictly.

    Args:
        model: a local folder, or a model id of the Hugging Face hub.
        trust_remote_code: run model code that the checkpoint contains.
        from_pretrained_kwargs: passed on: dtype, device_map, attn_implementation, revision, ...

    Raises:
        RacError: a missing or damaged file or tensor, or tensors that are not the model's.
            transformers starts a missing weight at random with a warning; here it is an error.

    Example:
        model = load_model("Qwen3-8B-rac-2of4", dtype="auto", device_map="auto")
    """
    try:
        from rac_modifier.checkpoint.hf_quantizer import check_complete
    except ImportError as error:
        raise RacError(
            f"the installed transformers is not supported ({error}); install the version that "
            "rac-modifier pins"
        ) from error
    if local := Path(model).is_dir():
        with TensorFiles(model) as files:
            check_packed(files, packed_format(read_json(Path(model) / CONFIG_FILE)))
    else:
        check_is_id(model)
    kwargs = {
        **from_pretrained_kwargs,
        "trust_remote_code": trust_remote_code,
        "ignore_mismatched_sizes": True,
    }
    try:
        loading: Any = AutoModelForCausalLM.from_pretrained(
            str(model), output_loading_info=True, **kwargs
        )
    except (RacError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers has many for config.json alone
        what, text = "cannot be loaded", " ".join(str(error).split())
        if isinstance(error, OSError) and not local:
            what = "neither a folder nor a model that can be had from the hub"
        raise RacError(
            f"{model}: {what} ({type(error).__name__}: {text}); compare its config.json and "
            "index with those that were saved with the weights"
        ) from error
    loaded, info = loading
    check_complete(info, model)
    return cast(PreTrainedModel, loaded)
