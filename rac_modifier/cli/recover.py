"""`rac recover`: train the weights of a checkpoint towards its dense model."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rac_modifier.cli.models import check_model, check_output, check_paths, load, resolve
from rac_modifier.cli.options import Column, Precision, processes, resumable, saving_step

if TYPE_CHECKING:
    from rac_modifier.settings.calibration import TraceSettings


def recover(
    dense: Annotated[
        str, typer.Argument(help='the dense model: a folder, a Hugging Face id, or "reasoner"')
    ],
    sparse: Annotated[
        Path,
        typer.Argument(help="folder of the sparse or quantized checkpoint that was made from it"),
    ],
    output: Annotated[
        Path, typer.Argument(help="folder for the recovered checkpoint; new or empty")
    ],
    store: Annotated[
        Path | None,
        typer.Option(
            "--traces",
            help="trace store of the dense model; what calibration used is left out, missing "
            "traces are sampled",
        ),
    ] = None,
    problems: Annotated[
        str | None,
        typer.Option(
            help="problems to sample on: a file, a dataset id, reasoning-gym:TASK, arithmetic "
            "(default; or the store's)"
        ),
    ] = None,
    column: Column = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="cap of a sampled completion; default: the store's, or 8192"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            help="a setting of `recover:` in a recipe, e.g. --set tokens=200000 (repeatable)",
        ),
    ] = None,
    precision: Precision = "auto",
) -> None:
    """Recover a sparse or quantized model: train its kept weights on the dense model's own traces.

    No pruned weight moves, and quantized weights are trained through their codes. The weights with
    the lowest divergence on held-out traces are kept, perhaps those before training. A run that was
    killed continues when it is started again.

    Example: rac recover reasoner reasoner-90 recovered --max-new-tokens 512 --set tokens=80000
    """
    from rac_modifier.settings.check import check_settings
    from rac_modifier.settings.recipe import set_values
    from rac_modifier.settings.recovery import RecoverySettings

    entry: dict[str, Any] = {}
    set_values(entry, set_ or [])
    settings = check_settings(RecoverySettings, entry, "--set")
    if processes() == 1:
        check_paths([dense, os.path.join(".", sparse)], output)  # a folder, no hub id
    from rac_modifier.checkpoint.output_folder import reserved
    from rac_modifier.distributed.torchrun import joined_processes

    kept = "the traces, and training up to its last state, are kept and will be used"
    # joined first: a machine that refuses the command ends the others
    with resumable(lambda: saving_step(output, kept)), joined_processes() as joined:
        check_model(resolve(dense))
        if joined.machine == 0:  # the others get the checkpoint
            check_model(resolve(str(sparse)))
            check_output(output, str(sparse))
        prompt = joined.from_first(_prompt_of(str(sparse)) if joined.is_first else None)
        traces = _traces(store, problems, column, max_new_tokens, prompt)
        from llmcompressor.modeling.moe.linearize import linearize_moe

        from rac_modifier.recovery.checkpoint import recover_checkpoint

        loading = partial(load, precision=precision)
        with reserved(output, writes=joined.is_first):
            divergence = recover_checkpoint(
                resolve(dense), sparse, output, settings, traces, joined, loading, linearize_moe
            )
            joined.wait()
    if divergence is None:  # the first process says so
        return
    before, after = divergence
    typer.echo(f"saved to {output}; held-out KL {before:.3f} -> {after:.3f} nats per token")


def _prompt_of(sparse: str) -> dict[str, Any]:
    """Return the prompt settings that calibrated the checkpoint; {} for several, or none."""
    from loguru import logger

    from rac_modifier.evaluation.calibrated_prompt import recorded_prompts

    recorded = [
        prompt.model_dump() for prompt in (recorded_prompts(resolve(sparse)) or {}).values()
    ]
    if any(prompt != recorded[0] for prompt in recorded):
        logger.warning(
            f"{sparse} was calibrated with several prompts; recovery asks with the chat template. "
            "Give a store of other traces with --traces"
        )
        return {}
    return recorded[0] if recorded else {}


def _traces(
    store: Path | None,
    problems: str | None,
    column: str | None,
    max_new_tokens: int | None,
    prompt: dict[str, Any],
) -> "TraceSettings":
    """Return problems and sampling: the store's, where there is one, with the options' changes.

    `prompt` has the settings of the prompts without a store.
    """
    from loguru import logger

    from rac_modifier.settings.calibration import TraceSettings
    from rac_modifier.settings.problems import ProblemSource
    from rac_modifier.settings.sampling import SamplingSettings
    from rac_modifier.traces.store import TraceStore

    # another seed than calibration's default gives other traces
    source, sampling = ProblemSource(), SamplingSettings(seed=1, **prompt)
    if store is not None and store.is_file():
        header = TraceStore.read(store).header
        source, sampling = header.problems, header.sampling
    elif store is not None:
        logger.warning(f"no trace store at {store} yet: all traces are sampled, and kept there")
    if problems is not None:
        source = ProblemSource(source=problems)
    if column is not None:  # checked again: a generator has none
        source = ProblemSource(**source.model_dump() | {"column": column})
    if max_new_tokens is not None:
        sampling = sampling.model_copy(update={"max_new_tokens": max_new_tokens})
    path = None if store is None else str(store)
    return TraceSettings(store=path, problems=source, sampling=sampling)
