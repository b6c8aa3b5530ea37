"""`rac pack`: anybody's model with zeros becomes a packed checkpoint; `rac unpack`: back again."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rac_modifier.cli.models import resolve
from rac_modifier.cli.options import AsJson, Model, print_json, render_table, resumable, saving_step

if TYPE_CHECKING:
    from rac_modifier.checkpoint.pack_plan import MatrixPlan, PackPlan

_HEAD = ("module", "shape", "dtype", "pattern", "zeros", "bytes", "packed", "note")


def pack(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="folder for the packed checkpoint; new or empty"),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="only look: print what would be packed and why not, write nothing"
        ),
    ] = False,
    keep_negative_zeros: Annotated[
        bool,
        typer.Option(
            "--keep-negative-zeros",
            help="store -0.0, which a mask that is multiplied in leaves, as a value, not as 0.0",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Pack the zeros of a pruned model away, whoever pruned it.

    The pattern of each module is found from its weights. A module that would not get smaller
    stays dense. The model is only read; loaded again, the result is the same to the bit, with 0.0
    for -0.0.

    Example: rac pack path/to/pruned-model packed-model

    Example: rac pack owner/pruned-model --check
    """
    if out is None and not check:
        raise typer.BadParameter(
            "name the folder to write, or look only: rac pack MODEL --check", param_hint="OUT"
        )
    from rac_modifier.checkpoint.output_folder import check_output_folder, local_folder, reserved

    target = None if check else out
    with resumable(lambda: saving_step(target)):
        source = local_folder(resolve(model))
        if target is not None:
            check_output_folder(target, source)
        from rac_modifier.checkpoint.pack_plan import plan_packing
        from rac_modifier.checkpoint.packing import pack_model

        with reserved(target):
            plan = plan_packing(source, keep_negative_zeros)
            summary = None if target is None else asdict(pack_model(plan, target, model))
    if as_json:
        matrices = [asdict(row) for row in plan.matrices]
        about = {"model": source, "format": plan.format, "out": target, "summary": summary}
        print_json({**about, "matrices": matrices})
    else:
        typer.echo(_render_plan(plan))
    if target is None:
        plan.check_gain()
    elif not as_json:
        typer.echo(f"packed into {out}; look at it with: rac inspect {out}")


def unpack(
    packed: Annotated[
        str,
        typer.Argument(metavar="PACKED", help="folder or Hugging Face id of a packed checkpoint"),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="folder for the new checkpoint; new or empty")
    ],
) -> None:
    """Write a packed checkpoint with dense weights, which stock transformers and stock vLLM load.

    The weights are the same to the bit; quantized ones keep their compressed-tensors format.

    Example: rac unpack packed-model dense-model
    """
    from rac_modifier.checkpoint.output_folder import local_folder, reserved

    with resumable(lambda: saving_step(out)):
        source = local_folder(resolve(packed))
        from rac_modifier.checkpoint.packing import unpack_model

        with reserved(out):
            summary = unpack_model(source, out)
    typer.echo(
        f"{len(summary.modules)} modules unpacked, {summary.packed_bytes:,} -> "
        f"{summary.dense_bytes:,} bytes; {out} loads without rac_modifier"
    )


def _render_plan(plan: "PackPlan") -> str:
    """Return a row per matrix and the totals."""
    counts = Counter(row.structure for row in plan.packed)
    patterns = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=str))
    before = sum(row.dense_bytes for row in plan.matrices)
    after = before - sum(row.dense_bytes - (row.packed_bytes or 0) for row in plan.packed)
    lines = [
        render_table(_HEAD, [_cells(row) for row in plan.matrices], text_columns=4),
        f"to be packed: {len(plan.packed)} of {len(plan.matrices)} matrices "
        f"({patterns or 'none'}), as {plan.format}",
        f"all matrices: {before:,} bytes dense, {after:,} packed",
    ]
    negative = sum(row.negative_zeros for row in plan.matrices)
    if negative:
        stored = (
            "values" if plan.keep_negative_zeros else "0.0; --keep-negative-zeros keeps the sign"
        )
        lines.append(f"{negative:,} of the zeros are -0.0 and are stored as {stored}")
    return "\n".join(lines)


def _cells(row: "MatrixPlan") -> tuple[str, ...]:
    return (
        row.name,
        f"{row.rows}x{row.columns}",
        row.dtype,
        row.structure or "?",
        "?" if row.sparsity is None else f"{row.sparsity:.2%}",
        f"{row.dense_bytes:,}",
        "-" if row.reason else f"{row.packed_bytes:,}",
        f"stays dense: {row.reason}" if row.reason else "",
    )
