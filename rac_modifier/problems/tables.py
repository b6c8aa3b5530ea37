"""Rows of a file or of a hub dataset, read with `datasets`; files need no network."""

import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rac_modifier.errors import RacError
from rac_modifier.runtime.files import regular_file

if TYPE_CHECKING:
    from datasets import Dataset

# By suffix: the loader of `datasets`, its options, and the content that it expects.
_LOADERS: dict[str, tuple[str, dict[str, Any], str]] = {
    ".jsonl": ("json", {"parse_agent_traces": False}, "one JSON object per line"),
    ".json": ("json", {"parse_agent_traces": False}, "a list of objects in JSON"),
    ".parquet": ("parquet", {}, "Parquet"),
    ".txt": ("text", {"sample_by": "document"}, "text in UTF-8"),
}


def is_file(source: str) -> bool:
    """Tell by its suffix whether a source is a file instead of the id of a dataset."""
    return Path(source).suffix in _LOADERS


def open_table(
    source: str, *, label: str, config: str | None = None, split: str = "train"
) -> "Dataset":
    """Open a .jsonl, .json, .parquet or .txt file, or a Hugging Face dataset; rows stay on disk."""
    with _opened(source, label, config, split, streaming=False) as table:
        return table


def stream_rows(
    source: str, *, label: str, config: str | None = None, split: str = "train"
) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a source, read (and downloaded) only as far as the iterator advances."""
    with _opened(source, label, config, split, streaming=True) as rows:
        yield from rows


@contextmanager
def _opened(
    source: str, label: str, config: str | None, split: str, *, streaming: bool
) -> Iterator[Any]:
    """Open a table; errors of `datasets` depend on format, hub and network, and name the source."""
    path = Path(source).expanduser()
    if is_file(source):
        if not path.exists():
            raise RacError(f"{label} {source!r}: no such file (paths are relative to {Path.cwd()})")
        if regular_file(path, label).stat().st_size == 0:
            raise RacError(f"{label} {source!r} is empty; name another file")
    try:
        import datasets  # takes half a second, and most runs read neither file nor dataset

        if is_file(source):
            loader, options, _ = _LOADERS[path.suffix]
            options = {**options, "data_files": glob.escape(str(path.absolute()))}  # no pattern
            yield datasets.load_dataset(loader, split="train", streaming=streaming, **options)
        else:
            yield datasets.load_dataset(source, config, split=split, streaming=streaming)
    except Exception as error:
        cause = error.__cause__ or error
        words = " ".join(f"{type(cause).__name__}: {cause}".split())[:500]
        if not is_file(source):
            raise RacError(
                f"{label} {source!r} (config {config!r}, split {split!r}) could not be loaded "
                f"({words}); check the name, the split and the config, or name a local file or "
                "a built-in source, none of which needs a download"
            ) from error
        raise RacError(
            f"{label} {source!r} could not be read ({words}); it must hold "
            f"{_LOADERS[Path(source).suffix][2]}: repair the file or name another"
        ) from error
