"""Draws a sample of mutants, runs their tests, prints what survived; exit status 1 if too much did."""

from __future__ import annotations

import argparse
import hashlib
import json
import queue
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from scripts.mutants.operators import Mutant, mutants_of
from scripts.mutants.reach import Environment, RecordedTest, choose, importers, record
from scripts.mutants.trial import Outcome, attempt, copy_tree

# Numerics, formats, selection, sampling, grading, pipelines, plugin.
ROOMS = (
    *("pruning", "quantization", "recovery", "calibration", "traces", "sampling", "problems"),
    *("checkpoint", "evaluation", "llmcompressor", "kernels", "vllm_plugin"),
)
LIMIT = 0.05  # of the sample may survive


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _options(arguments)
    tree, cache = options.tree.resolve(), options.tree.resolve() / ".mutants"
    cache.mkdir(exist_ok=True)
    mutants = [
        mutant
        for room in options.rooms
        for path in sorted((tree / options.package / room).rglob("*.py"))
        for mutant in mutants_of(path.relative_to(tree).as_posix(), path.read_bytes())
    ]
    sample = draw(mutants, options.sample, options.seed)
    harmless = read_harmless(options.harmless)
    copies = [copy_tree(tree, cache / f"tree{number}") for number in range(options.workers)]
    tests = [
        (environment, record(environment, copies[0], options.package, cache / "recording"))
        for environment in _environments(options, tree)
    ]
    users = importers(tree, options.package)
    results = Results(cache / "results.jsonl", tree, options.package, [e for e, _ in tests])
    outcomes = {m: known for m in sample if (known := results.known(m)) is not None}
    if outcomes and options.fresh:
        outcomes = {}
    todo = [mutant for mutant in sample if mutant not in outcomes]
    print(
        f"{len(mutants)} mutants, {len(sample)} in the sample, {len(outcomes)} of them known",
        flush=True,
    )
    trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for copy in copies:
        trees.put(copy)

    def run(mutant: Mutant) -> Outcome:
        copy = trees.get()
        try:
            choices = [
                (e, choose(mutant, found, users[mutant.file], options.budget)) for e, found in tests
            ]
            return attempt(mutant, choices, copy, options.package)
        finally:
            trees.put(copy)

    _check_copies(copies if todo else [], tests, options.package)
    with ThreadPoolExecutor(options.workers) as pool:
        running = {pool.submit(run, mutant): mutant for mutant in todo}
        try:
            for done in as_completed(running):
                mutant, outcome = running[done], done.result()
                outcomes[mutant] = outcome
                results.add(mutant, outcome)
                place = f"[{len(outcomes)}/{len(sample)}] {mutant.file}:{mutant.line}"
                print(
                    f"{place} {outcome.result}, {outcome.tests} tests, {outcome.seconds:.0f} s",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return report(sample, outcomes, harmless, mutants)


def draw(mutants: list[Mutant], number: int, seed: int) -> list[Mutant]:
    """A sample with at most one mutant per line. A change elsewhere in the code keeps the others in the sample."""

    def rank(mutant: Mutant) -> str:
        return hashlib.sha256(f"{seed} {mutant.identity}".encode()).hexdigest()

    first: dict[tuple[str, int], Mutant] = {}
    for mutant in sorted(mutants, key=rank):
        first.setdefault((mutant.file, mutant.line), mutant)
    # by line, so that a line with many mutants is not drawn more often
    lines = sorted(first.values(), key=lambda m: rank(m)[::-1])
    return sorted(lines[:number], key=lambda m: (m.file, m.line))


def read_harmless(path: Path) -> dict[str, str]:
    """Mutants that may survive, with their reasons: `identity  # reason` per line."""
    harmless: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        if line.strip() and not line.startswith("#"):
            identity, separator, reason = line.rpartition("  # ")
            if not separator or not reason.strip():
                raise SystemExit(f"{path}: {line!r} has no reason; write `identity  # reason`")
            harmless[identity.strip()] = reason.strip()
    return harmless


def report(
    sample: list[Mutant],
    outcomes: dict[Mutant, Outcome],
    harmless: dict[str, str],
    every: list[Mutant],
) -> int:
    """Print the survivors; 1 if there are too many."""
    counts = Counter(outcome.result for outcome in outcomes.values())
    survivors = [mutant for mutant in sample if outcomes[mutant].survived]
    bad = [mutant for mutant in survivors if mutant.identity not in harmless]
    print(
        f"\n{len(sample)} mutants: "
        + ", ".join(f"{number} {result}" for result, number in sorted(counts.items()))
    )
    for mutant in bad:
        tests = (
            f"survived {outcomes[mutant].tests} tests"
            if outcomes[mutant].tests
            else "no test reaches it"
        )
        print(f"\n{mutant.file}:{mutant.line}: {tests}\n  {mutant.identity}")
    if known := len(survivors) - len(bad):
        print(f"\n{known} more survivors are in the list of harmless ones")
    if stale := harmless.keys() - {mutant.identity for mutant in every}:
        print(
            "\nThe list of harmless ones names mutants that do not exist (any more):",
            *sorted(stale),
            sep="\n  ",
        )
    share = len(bad) / max(len(sample), 1)
    print(f"\n{len(bad)} of {len(sample)} survived ({share:.1%}); at most {LIMIT:.0%} may")
    return int(share > LIMIT)


class Results:
    """Outcomes on disk, a line of JSON each.

    A mutant that was killed stays known while its file is the same. One that survived stays known while no file of the
    package and the tests changes, and the same test files are looked at.
    """

    def __init__(
        self, path: Path, tree: Path, package: str, environments: list[Environment]
    ) -> None:
        self.path, self.tree = path, tree
        files = sorted(
            file for folder in (package, "tests") for file in (tree / folder).rglob("*.py")
        )
        content = (
            b"".join(file.read_bytes() for file in files)
            + repr([e.test_files for e in environments]).encode()
        )
        self.all_files = hashlib.sha256(content).hexdigest()[:16]
        lines = path.read_text().splitlines() if path.is_file() else []
        self.found = {record["key"]: record["outcome"] for record in map(json.loads, lines)}

    def _key(self, mutant: Mutant, survived: bool) -> str:
        content = (
            self.all_files
            if survived
            else hashlib.sha256((self.tree / mutant.file).read_bytes()).hexdigest()[:16]
        )
        return f"{content} {mutant.identity}"

    def known(self, mutant: Mutant) -> Outcome | None:
        """What an earlier run found, if it still holds."""
        for survived in (False, True):
            if (found := self.found.get(self._key(mutant, survived))) is not None:
                return Outcome(**found)
        return None

    def add(self, mutant: Mutant, outcome: Outcome) -> None:
        """Keep an outcome."""
        record = {"key": self._key(mutant, outcome.survived), "outcome": outcome.as_dict()}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _check_copies(
    copies: list[Path], tests: list[tuple[Environment, list[RecordedTest]]], package: str
) -> None:
    """A quick test passes in each copy without a mutant; otherwise every mutant would seem to be killed."""
    for copy in copies:
        for environment, found in tests:
            quick = sorted(found, key=lambda test: test.seconds)[:3]
            if quick and not attempt(None, [(environment, quick)], copy, package).survived:
                raise SystemExit(
                    f"{environment.name}: {[test.name for test in quick]} fail in {copy} without a mutant"
                )


def _environments(options: argparse.Namespace, tree: Path) -> list[Environment]:
    files = tuple(
        sorted(path.relative_to(tree).as_posix() for path in (tree / "tests").rglob("test_*.py"))
    )
    files = tuple(file for file in files if file.startswith(tuple(options.tests)))
    environments = [Environment("compress", options.compress, files)]
    if options.serve:
        from tests.conftest import SERVING_TESTS

        quick = () if options.slow else ("-m", "not slow")
        named = tuple(
            f
            for f in files
            if any(f == f"tests/{s}" or f.startswith(f"tests/{s}/") for s in SERVING_TESTS)
        )
        environments.append(Environment("serve", str(Path(options.serve).absolute()), named, quick))
    return environments


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.mutants", description=__doc__)
    parser.add_argument("--sample", type=int, default=200, help="how many mutants (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed draws another sample (%(default)s)"
    )
    parser.add_argument(
        "--rooms",
        type=lambda text: text.split(","),
        default=ROOMS,
        help="folders of the package, a,b,c",
    )
    parser.add_argument(
        "--tests",
        type=lambda text: text.split(","),
        default=["tests"],
        help="only these tests: a,b,c",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="mutants at a time, a core each (%(default)s)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=120,
        help="seconds of tests per mutant and environment (%(default)s)",
    )
    parser.add_argument(
        "--compress",
        default=sys.executable,
        help="python of the compressing environment (this one)",
    )
    parser.add_argument(
        "--serve", help="python of the serving environment; without it, its tests are not run"
    )
    parser.add_argument(
        "--slow",
        action="store_true",
        help="slow tests of the serving environment too: they start engines",
    )
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    parser.add_argument(
        "--tree", type=Path, default=Path(), help="root of the repository (working directory)"
    )
    parser.add_argument(
        "--package", default="rac_modifier", help="the folder that is mutated (%(default)s)"
    )
    parser.add_argument(
        "--harmless",
        type=Path,
        default=Path("scripts/mutants_harmless.txt"),
        help="list (%(default)s)",
    )
    options = parser.parse_args(arguments)
    options.compress = str(Path(options.compress).absolute())
    return options


if __name__ == "__main__":
    sys.exit(main())
