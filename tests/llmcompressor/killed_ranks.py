"""Kill one process of a pruning run again and again: `python -m tests.llmcompressor.killed_ranks KILLS PROCESSES`.

It writes into the present folder. A run is killed five times in a life: before its first file, twice after a file, while a file
is written, and while the result is saved; which process is killed and when within that time is chance. A kill waits for what the
run has written, not for a time, so that a slow machine sees the same kills. Then the same command ends it undisturbed, and the
next life begins. The writing of files is drawn out, so that kills meet it. Prints a table of what was killed and what was lost,
and all of it as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_modifier.llmcompressor import resume
from rac_modifier.llmcompressor import run as run_module
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.collect import collect_traces
from tests.llmcompressor.several_processes import ended, start
from tests.tiny import entry, recipe, save_tiny

BEFORE, AFTER, WRITING, SAVING = MOMENTS = (
    "before the first file",
    "between two files",
    "while a file is written",
    "while the result is saved",
)
_WRITING_TAKES = 0.2  # seconds
GROUPS = 8  # four in each of the tiny model's two layers
_MODEL = "model"
_RECIPE = Path("recipe.yaml")


@dataclass(frozen=True)
class Kill:
    """One kill: the `rank` that was killed, when by what was found after it, and what is left.

    `kept` files of groups are there, `pruned` groups were finished in all lives of the run, and `half` says whether a file is
    half written. `other` has the exit codes of the other processes.
    """

    rank: int
    moment: str
    kept: int
    pruned: int
    half: bool
    other: tuple[int, ...]

    @property
    def lost(self) -> int:
        """Groups that were pruned and have to be pruned again; the one in progress is lost too."""
        return self.pruned - self.kept


def files(output: str, ending: str = "safetensors") -> int:
    """Files of finished groups, or (`new`) half written ones."""
    return len(list(Path(f"{output}.unfinished").glob(f"group-*.{ending}")))


def drawn_out(output: str) -> None:
    """In a process of a run: files of groups are written in two halves, and each group that is pruned is noted."""

    def halves(tensors: Any, path: Path, metadata: Any) -> None:
        whole = path.with_suffix(".whole")
        save_file(tensors, whole, metadata=metadata)
        data = whole.read_bytes()
        whole.unlink()
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            time.sleep(_WRITING_TAKES)
            file.write(data[len(data) // 2 :])

    resume.save_file = halves  # type: ignore[attr-defined]
    add = resume.FinishedGroups.add

    def noted(self: Any, *args: Any) -> None:
        with open(f"{output}.pruned", "a") as file:
            file.write(".")
        add(self, *args)

    resume.FinishedGroups.add = noted  # type: ignore[method-assign]


def began_to_prune(output: str) -> None:
    """In each process: note that a group is being pruned."""
    solve = run_module.solve_groups

    def noted(*args: Any, **kwargs: Any) -> Any:
        with open(f"{output}.began", "a") as file:
            file.write(".")
        return solve(*args, **kwargs)

    run_module.solve_groups = noted


def begin(output: str, count: int) -> dict[int, int]:
    """Start the processes of a run."""
    Path(f"{output}.began").unlink(missing_ok=True)

    def before() -> None:
        began_to_prune(output)
        drawn_out(output)

    return start(_MODEL, _RECIPE, output, count, dict.fromkeys(range(count), before))


def wait_until(true: Callable[[], bool], children: dict[int, int]) -> None:
    """Until something is on disk, or a process has ended (it is not reaped), or for a minute."""
    late = time.monotonic() + 60.0
    while not true() and time.monotonic() < late:
        for child in children.values():
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
        time.sleep(0.001)


def kill(output: str, count: int, wanted: str, chance: random.Random) -> Kill | None:
    """Start the run, kill one of its processes at such a moment, and wait for the others; None where the run ended before."""
    found, more = files(output), chance.choice([1, 1, 2])
    signs: dict[
        str, tuple[Callable[[], bool], float]
    ] = {  # what to wait for, and the longest time until the kill
        BEFORE: (lambda: Path(f"{output}.began").exists(), 0.02),
        AFTER: (lambda: files(output) >= min(found + more, GROUPS), 0.05),
        WRITING: (lambda: files(output, "new") > 0, _WRITING_TAKES),
        SAVING: (lambda: os.path.isdir(output), 0.02),
    }
    sign, longest = signs[wanted]
    if wanted == WRITING:  # a half file that is left from the kill before is no sign
        for path in Path(f"{output}.unfinished").glob("group-*.new"):
            path.unlink()
    rank = chance.randrange(count)
    children = begin(output, count)
    wait_until(sign, children)
    time.sleep(chance.uniform(0.0, longest))
    os.kill(children[rank], signal.SIGKILL)
    moment = (
        SAVING
        if os.path.isdir(output)
        else WRITING
        if files(output, "new")
        else AFTER
        if files(output)
        else BEFORE
    )
    codes = ended(children, agent=True)
    if codes[rank] != -signal.SIGKILL:
        return None
    pruned = Path(f"{output}.pruned")
    finished = len(pruned.read_text()) if pruned.exists() else 0
    kept = files(output) if os.path.isdir(f"{output}.unfinished") else finished  # else all is saved
    pruned.write_text("." * kept)  # what was lost is counted once
    others = tuple(code for other, code in enumerate(codes) if other != rank)
    return Kill(rank, moment, kept, finished, files(output, "new") > 0, others)


def taken_up(output: str, count: int) -> bool | None:
    """Whether a half saved result is taken up: the next start ends the run, or names what to remove.

    What is to be removed is then removed. None where nothing was in the folder yet.
    """
    held = os.listdir(output)
    codes = ended(begin(output, count))
    if set(codes) == {0} and set(held) <= {".rac_saving"}:
        return True if held else None
    said = Path(f"{output}.0.txt").read_text()
    os.rename(output, f"{output}.half-saved-{time.monotonic_ns()}")
    return set(codes) == {1} and f"remove {output} and start the same run again" in said


def table(kills: list[Kill], count: int) -> list[str]:
    """A row per moment and process."""
    lines = [
        "| killed | when | kills | groups pruned and lost | half file left | exit of the other |",
        "|---|---|---|---|---|---|",
    ]
    for moment in MOMENTS:
        for rank in range(count):
            alike = [each for each in kills if (each.moment, each.rank) == (moment, rank)]
            if alike:
                codes = sorted({code for each in alike for code in each.other})
                lost = sum(each.lost for each in alike)
                halves = sum(each.half for each in alike)
                ends = (
                    ", ".join(
                        f"{code} ({sum(each.other == (code,) for each in alike)})" for code in codes
                    )
                    or "-"
                )
                lines.append(
                    f"| process {rank} of {count} | {moment} | {len(alike)} | {lost} | {halves} | {ends} |"
                )
    return lines


def main() -> None:
    """See above."""
    count_of_kills, count = (int(word) for word in sys.argv[1:])
    torch.set_num_threads(1)
    resume._SAVE_SECONDS = 0.0  # here and not at import: tests import this module
    save_tiny(Path(_MODEL))
    settings = TraceSettings(**entry()["traces"])
    loaded = AutoModelForCausalLM.from_pretrained(_MODEL), AutoTokenizer.from_pretrained(_MODEL)
    store = Path("traces.jsonl")
    collect_traces(
        *loaded,
        store,
        problems=settings.problems,
        sampling=settings.sampling,
        tokens=4000,
        progress=False,
    )
    calibration = {"tokens": 1500, "batch_tokens": 256, "held_out_tokens": 100}
    _RECIPE.write_text(recipe(entry(store.absolute(), calibration=calibration)))
    assert set(ended(begin("undisturbed", count))) == {0}, Path("undisturbed.0.txt").read_text()
    chance = random.Random(0)
    kills: list[Kill] = []
    lives: list[str] = []
    told: list[bool] = []  # per half saved result, whether the next start took it up
    tries = 0
    while len(kills) < count_of_kills and tries < 3 * count_of_kills:
        output = f"life-{len(lives)}"
        lives.append(output)
        for wanted in (BEFORE, AFTER, WRITING, AFTER, SAVING):
            tries += 1
            if len(kills) == count_of_kills or (
                not os.path.isdir(f"{output}.unfinished") and os.path.isdir(output)
            ):
                break
            one = kill(output, count, wanted, chance)
            kills += [one] if one is not None else []
            if os.path.isdir(output) and os.path.isdir(f"{output}.unfinished"):
                told += [said] if (said := taken_up(output, count)) is not None else []
        if os.path.isdir(f"{output}.unfinished") or not os.path.isdir(output):
            assert set(ended(begin(output, count))) == {0}, Path(f"{output}.0.txt").read_text()
    print(*table(kills, count), sep="\n")
    rows = [{**asdict(each), "lost": each.lost} for each in kills]
    print(json.dumps({"kills": rows, "lives": lives, "told": told}))


if __name__ == "__main__":
    main()
