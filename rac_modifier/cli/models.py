"""Find, load or serve the models that a command names, and refuse early what cannot work."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rac_modifier.cli.options import Dtype
from rac_modifier.errors import RacError
from rac_modifier.runtime.progress import Phase

if TYPE_CHECKING:
    from rac_modifier.settings.sampling import EngineSettings, SamplingSettings

API_KEY = "OPENAI_API_KEY"  # as in OpenAI's own client
_TIMEOUT = 600.0  # seconds per answer, at least
_LONGEST_TIMEOUT = 1e6
_TOKENS_PER_SECOND = 10.0  # of all answers in progress together, on a slow server
_SHORTEST = 1024  # tokens of --max-model-len; what compares models needs fewer
_NAMES = 'give a model folder, a Hugging Face id, or "reasoner"'


def resolve(model: str) -> str:
    """Return the folder or id for `from_pretrained`; "reasoner" is the embedded model."""
    from rac_modifier.reasoner import reasoner_path

    return str(reasoner_path()) if model == "reasoner" else model


def check_paths(models: Iterable[str], output: Path | None = None) -> None:
    """Refuse folders that are no models, or an output folder in use (RacError).

    This takes no second: neither torch nor transformers is imported.
    """
    from rac_modifier.checkpoint import output_folder

    for source in map(resolve, models):
        folder = Path(source)
        is_path = folder.exists() or source.count("/") > 1 or source[:1] in ("", ".", "/", "~")
        if is_path and (problem := output_folder.folder_problem(folder)):
            raise _no_model(source, problem)
        if output is not None:
            output_folder.check_output_folder(output, folder)


def _no_model(source: str, why: object, next_step: str = _NAMES) -> RacError:
    return RacError(f"no model at {source!r} ({why}); {next_step}")


def check_model(source: str) -> None:
    """Refuse a model that does not exist, before hours of work (RacError)."""
    check_paths([source])
    from transformers import AutoConfig, __version__  # takes seconds

    folder = Path(source)

    try:
        AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers has many for config.json alone
        if "trust_remote_code" in str(error):
            raise RacError(
                f"the model {source!r} needs code of its own (auto_map in config.json), which is "
                f"not run; take a model of an architecture that transformers {__version__} has"
            ) from error
        if folder.is_dir():
            step = f"transformers {__version__} must be able to read its config.json"
            raise _no_model(source, _first_line(error), step) from error
        why = f"no folder here, and from the hub: {_first_line(error)}"
        raise _no_model(source, why) from error


def load_tokenizer(source: str, next_step: str = "save the model's next to it") -> Any:
    """Return the tokenizer of a model (RacError: none; its text ends in `next_step`)."""
    from transformers import AutoTokenizer

    why = "there are no tokenizer files"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        # for some model types transformers makes one without a vocabulary out of no files
        if tokenizer("a", add_special_tokens=False)["input_ids"]:
            return tokenizer
    except Exception as error:  # so has tokenizers for damaged files
        why = _first_line(error)
    raise RacError(f"no tokenizer could be loaded from {source!r} ({why}); {next_step}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def load(model: str, precision: Dtype) -> tuple[Any, Any]:
    """Return a model, packed or not, with its tokenizer."""
    from rac_modifier.checkpoint.hf_quantizer import load_model
    from rac_modifier.runtime.cpu_tuning import keep_freed_memory

    keep_freed_memory()
    source = resolve(model)
    check_model(source)
    tokenizer = load_tokenizer(source)
    with Phase(f"loading {model}"):
        return load_model(source, dtype=precision), tokenizer


def load_on_accelerator(model: str, precision: Dtype) -> tuple[Any, Any]:
    """Load a model and move it to the accelerator, where there is one (RacError: too large)."""
    from rac_modifier.runtime.models import accelerator, check_fits

    gc.collect()  # a quantized model refers to itself, and a dropped one would stay on the device
    loaded, tokenizer = load(model, precision)
    if (device := accelerator()) is not None:
        step = "use a device with more memory, or CUDA_VISIBLE_DEVICES= to compute on the CPU"
        check_fits(loaded, device, step)
        loaded = loaded.to(device)
    return loaded, tokenizer


def _unpacked(source: str, precision: Dtype) -> Any:
    """Return what oneshot takes: the source, or the loaded model where its weights are packed."""
    from rac_modifier.checkpoint.hf_quantizer import load_model
    from rac_modifier.formats.quantization_config import CONFIG_FILE, packed_format
    from rac_modifier.runtime.files import read_json

    folder = Path(source)
    if folder.is_dir() and not any(
        path.suffix in (".safetensors", ".bin") for path in folder.iterdir()
    ):
        raise RacError(
            f"{source}: no weights in it; complete the download, or save the model as safetensors"
        )
    config = folder / CONFIG_FILE
    packed = config.is_file() and packed_format(read_json(config)) is not None
    return load_model(source, dtype=precision) if packed else source


def compress(recipe: dict[str, Any], source: str, output: Path, precision: Dtype) -> None:
    """Apply a recipe to a model with llm-compressor, and save the result to `output`."""
    import yaml
    from llmcompressor import oneshot

    oneshot(
        model=_unpacked(source, precision),
        recipe=yaml.safe_dump(recipe, sort_keys=False),
        precision=precision,
        output_dir=str(output),
    )


def check_loading(source: str) -> None:
    """Refuse weights that do not fit into the host's memory, where they are cached (RacError)."""
    import psutil

    from rac_modifier.checkpoint import output_folder

    size, available = output_folder.bytes_of_weights(source), int(psutil.virtual_memory().available)
    if size is not None and size > available:
        raise RacError(
            f"the weights of {source} take {size / 2**30:.1f} GiB of the host's memory, and "
            f"{available / 2**30:.1f} GiB are available: use a machine with more memory"
        )


def subject_of(model: str) -> tuple[Any, Any]:
    """Return identity and tokenizer of a model that servers sample; no weight is loaded."""
    from rac_modifier.sampling.model_identity import ModelIdentity

    source = resolve(model)
    check_model(source)
    return ModelIdentity.of_files(source), load_tokenizer(source)


def check_output(output: Path, source: str, *, keeps_groups: bool = False) -> None:
    """Refuse an unusable output folder, or a disk that is known to be too full (RacError)."""
    from rac_modifier.checkpoint import output_folder

    output_folder.check_output_folder(output, Path(source))
    if (size := output_folder.bytes_of_weights(source)) is not None:
        # the dense weights and the packed ones, while they are packed in place
        output_folder.check_room(output, 2 * size, size if keeps_groups else 0)


@contextmanager
def own_server(
    model: str,
    precision: Dtype,
    concurrency: int,
    questions: Iterable[tuple[str, SamplingSettings]],
) -> Iterator[EngineSettings]:
    """Run `vllm serve` with the model in the context, for these or like questions."""
    from rac_modifier.sampling.generate import render_question
    from rac_modifier.sampling.own_server import VllmCommand

    command = VllmCommand.from_environment()
    identity, tokenizer = subject_of(model)
    cap, longest = 0, _SHORTEST
    for question, sampling in questions:
        cap = max(cap, sampling.max_new_tokens)
        # twice: of many problems only the first were looked at
        prompt = 2 * len(render_question(tokenizer, question, sampling))
        longest = max(longest, prompt + sampling.max_new_tokens)
    fits = identity.context is None or longest < identity.context
    with command.serve(resolve(model), precision, longest=longest if fits else None) as url:
        yield engine_of((url,), concurrency, cap)


def engine_of(
    urls: Sequence[str], concurrency: int, cap: int, served_as: str | None = None
) -> EngineSettings:
    """Return the settings of servers whose answers have at most `cap` tokens."""
    from rac_modifier.settings.check import check_settings
    from rac_modifier.settings.sampling import EngineSettings

    slowest = cap * concurrency / _TOKENS_PER_SECOND
    values = {
        "base_urls": urls,
        "model": served_as,
        "concurrency": concurrency,
        "timeout": min(max(_TIMEOUT, slowest), _LONGEST_TIMEOUT),
        "api_key_env": API_KEY if os.environ.get(API_KEY) else None,
    }
    return check_settings(EngineSettings, values, "--server")
