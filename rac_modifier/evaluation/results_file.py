"""The file that `rac eval --json FILE` writes: checked before it is written, read as a baseline."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rac_modifier.errors import RacError
from rac_modifier.evaluation.results import EvalResult
from rac_modifier.runtime.files import read_json
from rac_modifier.settings.sampling import PromptSettings, SamplingSettings


def read_results(path: Path, sampling: SamplingSettings) -> list[EvalResult]:
    """Read the file that `rac eval --json FILE` wrote, to pair it with answers sampled so.

    RacError: there is none, it is of another version, or has another prompt or top-p.
    """
    prompt = PromptSettings.of(sampling)
    content = read_json(path, "write it with: rac eval DENSE --json FILE")
    results = content.get("results")
    if not isinstance(results, list) or not results:
        raise RacError(f"{path} holds no accuracies; write it with: rac eval DENSE --json FILE")
    try:
        asked = PromptSettings.model_validate(content.get("prompt"))
        if asked != prompt:
            raise RacError(
                f"{path} cannot be paired: {asked.describe()} there, and {prompt.describe()} here; "
                "evaluate both alike (--template, --system-prompt, --thinking)"
            )
        top_p = (content.get("protocol") or {}).get("top_p")
        if sampling.temperature and top_p != sampling.top_p:
            raise RacError(
                f"{path} cannot be paired: top-p {top_p} there, and {sampling.top_p} here; "
                "evaluate both alike (--top-p)"
            )
        return list(map(EvalResult.model_validate, results))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise RacError(
            f"{path}: no evaluation result ({field}: {first['msg']}); evaluate with this version"
        ) from error


def check_json_out(path: Path, baseline: Path | None = None) -> None:
    """Refuse a file that cannot be written, is the baseline or holds other content (RacError)."""
    if baseline is not None and path.resolve() == baseline.resolve():
        raise RacError(f"--json {path}: --baseline reads this file; name a new one")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise RacError(f"--json {path}: its folder does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise RacError(f"--json {path}: its folder cannot be written to; name another one")
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    content: dict[str, Any] = {}
    with suppress(RacError):  # a folder, or no JSON
        content = read_json(path)
    if "prompt" not in content or not {"results", "divergence"} & content.keys():
        raise RacError(f"--json {path}: is there, and not of an earlier rac eval; name a new file")
