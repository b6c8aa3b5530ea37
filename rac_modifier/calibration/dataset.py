"""Traces as a `datasets.Dataset` or a file, for any tool that trains or calibrates.

A row has `input_ids` as the model wrote them (nothing is tokenized again), `attention_mask`, and
`loss_mask`, which is 1 for the tokens of completions. Neither llm-compressor nor vLLM is imported.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rac_modifier.calibration.trace_pool import collect_for_calibration
from rac_modifier.errors import RacError, refusing
from rac_modifier.reasoner import reasoner_path
from rac_modifier.runtime.files import public_name, replacing
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.settings.calibration import CalibrationSettings, SelectSettings, TraceSettings
from rac_modifier.settings.check import check_settings
from rac_modifier.traces.records import StoreHeader, Trace
from rac_modifier.traces.selection import Judge, Selection
from rac_modifier.traces.store import TraceStore

if TYPE_CHECKING:
    from datasets import Dataset, Features

Row = dict[str, Any]
FORMATS = ("parquet", "jsonl", "imatrix")
_TRACE_COLUMNS = ("id", "problem_id", "finish_reason", "question", "answer")
_BATCH = 1000  # rows that are written at a time


def trace_dataset(
    model: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokens: int,
    problems: str | Mapping[str, Any] = "arithmetic",
    server: str | Sequence[str] | Mapping[str, Any] | None = None,
    store: str | os.PathLike[str] | None = None,
    sampling: Mapping[str, Any] | None = None,
    selection: Mapping[str, Any] | None = None,
    length: int | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> "Dataset":
    """Sample a model's own chains of thought, or read them from a store, as a dataset.

    `info.description` is JSON: model, store with its hash, sampling settings and counts. RacError
    for a wrong setting, and as `collect_traces`.

    Args:
        model: a folder, a Hugging Face id, "reasoner", or a model in memory. With `server`, the
            weights of a folder or id are not loaded.
        tokens: prompt and completion tokens, at least. Sampling stops at this budget.
        problems: `traces.problems` of a recipe, or its `source` alone.
        server: addresses of OpenAI-compatible servers, or `traces.engine` of a recipe; default: the
            model samples in this process.
        store: the file that keeps the traces; a killed run goes on from it.
        sampling: `traces.sampling` of a recipe.
        selection: `traces.select` of a recipe.
        length: pack the traces into rows of this many tokens; default: a row per trace.
        tokenizer: default: the folder's or id's.
        seed: of the order in which traces are drawn.
    """
    if length is not None and length < 1:
        raise RacError(f"length={length}: a row holds at least one token; give a larger length")
    if isinstance(server, str):
        server = {"base_urls": [server]}
    elif server is not None and not isinstance(server, Mapping):
        server = {"base_urls": list(server)}
    written = {
        "problems": {"source": problems} if isinstance(problems, str) else problems,
        "engine": server,
        "store": None if store is None else str(store),
        "sampling": sampling or {},
        "select": selection or {},
    }
    settings = check_settings(TraceSettings, written, "trace_dataset")
    budget = {"tokens": tokens, "held_out_tokens": 0, "seed": seed}
    calibration = check_settings(CalibrationSettings, budget, "trace_dataset")
    subject: Any = model  # a model or, if a server samples, its identity
    if not isinstance(model, PreTrainedModel):
        source = str(reasoner_path() if str(model) == "reasoner" else model)
        try:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            subject = (
                AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
                if server is None
                else ModelIdentity.of_files(source)
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise RacError(
                f"trace_dataset: {source!r} cannot be loaded ({reason}); give a model folder with "
                'its tokenizer, a Hugging Face id, or "reasoner"'
            ) from error
    elif tokenizer is None:
        raise RacError("trace_dataset: a model in memory needs its tokenizer; give tokenizer=")
    pool = collect_for_calibration(subject, tokenizer, settings, calibration)["traces"]
    drawn = (_row(sequence.ids, sequence.prompt_tokens) for sequence in pool.draw("traces", tokens))
    rows = list(_packed(drawn, length) if length else drawn)
    if not rows:
        raise RacError(f"the traces do not fill a row of length={length}; give a shorter length")
    from datasets import Dataset, DatasetInfo

    record = {
        **pool.store.header.model_dump(mode="json"),
        "store": public_name(pool.store.path),
        "sha256": pool.store.sha256(),
        "selection": pool.selection.as_dict(),
        "rows": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
    }
    info = DatasetInfo(description=json.dumps(record), features=_features())
    return Dataset.from_list(rows, features=info.features, info=info)


def export_store(
    store: TraceStore,
    output: Path,
    *,
    settings: SelectSettings | None = None,
    tokenizer: Any = None,
    text: bool = False,
    file_format: str | None = None,
) -> int:
    """Write the traces of a store to a file; return the number of traces.

    Formats are "parquet", "jsonl" (the default is the suffix) and "imatrix": the text with its
    special tokens, as llama.cpp's llama-imatrix reads it with --parse-special. The tokenizer is
    needed for text, and for a selection by answers. RacError for another format, a trace store in
    the place of the file, no trace to write, or a file that cannot be written.
    """
    file_format = file_format or output.suffix.removeprefix(".")
    if file_format not in FORMATS:
        raise RacError(
            f"{str(output)!r}: name a file that ends in .parquet or .jsonl, or give --format "
            f"{FORMATS[-1]}"
        )
    if not output.absolute().parent.is_dir():
        raise RacError(f"{str(output)!r}: its folder does not exist; create it first")
    if StoreHeader.is_in(output):
        raise RacError(f"{str(output)!r} is a trace store, and stays as it is; name another file")
    selection = Selection(settings or SelectSettings())
    judge = Judge(tokenizer, store.header)
    columns = [*_TRACE_COLUMNS, *(("prompt", "completion") if text else ())]

    def chosen() -> Iterator[Trace]:
        return selection.keep((trace.without_repeats() for trace in store), judge)

    def rows() -> Iterator[Row]:
        return (_described(trace, tokenizer if text else None) for trace in chosen())

    step = "make room, or name another file"
    with refusing(f"{str(output)!r} cannot be written", step, OSError), replacing(output) as new:
        if file_format == "imatrix":
            with new.open("w", encoding="utf-8") as file:
                file.writelines(f"{tokenizer.decode(trace.sequence[0])}\n" for trace in chosen())
        elif file_format == "jsonl":
            with new.open("w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows())
        else:
            from datasets import IterableDataset

            dataset = IterableDataset.from_generator(rows, features=_features(*columns))
            dataset.to_parquet(str(new), batch_size=_BATCH)
        if not selection.kept:
            raise RacError(
                f"trace store {str(store.path)!r}: {selection.describe()}, and no row to "
                "write; collect more traces, or loosen the selection"
            )
    return selection.kept


def _packed(rows: Iterable[Row], length: int) -> Iterator[Row]:
    """Join rows and cut them into rows of `length` tokens; tokens that fill no row are left out."""
    ids: list[int] = []
    loss: list[int] = []
    for row in rows:
        ids += row["input_ids"]
        loss += row["loss_mask"]
        while len(ids) >= length:
            yield {**_row(ids[:length], 0), "loss_mask": loss[:length]}
            ids, loss = ids[length:], loss[length:]


def _row(ids: Sequence[int], prompt_tokens: int) -> Row:
    return {
        "input_ids": list(ids),
        "attention_mask": [1] * len(ids),
        "loss_mask": [0] * prompt_tokens + [1] * (len(ids) - prompt_tokens),
    }


def _described(trace: Trace, tokenizer: Any) -> Row:
    """Return the row of a trace with what the store knows about it, and with its text."""
    row = _row((*trace.prompt_ids, *trace.completion_ids), len(trace.prompt_ids))
    row |= {name: getattr(trace, name) for name in _TRACE_COLUMNS}
    if tokenizer is not None:
        row["prompt"] = tokenizer.decode(list(trace.prompt_ids))
        row["completion"] = tokenizer.decode(list(trace.completion_ids))
    return row


def _features(*texts: str) -> "Features":
    from datasets import Features, Sequence, Value

    masks = ("attention_mask", "loss_mask")
    columns: dict[str, Any] = {"input_ids": Sequence(Value("int32"))}
    columns |= {name: Sequence(Value("int8")) for name in masks}
    return Features(columns | {name: Value("string") for name in texts})
