"""Which `vllm` is started, with which options."""

import json

import pytest

from rac_modifier.errors import RacError
from rac_modifier.sampling.vllm_command import VllmCommand, check_serving
from tests.sampling import fake_vllm


@pytest.mark.parametrize(
    ("bits", "options", "added"),
    [(2, (), True), (3, (), True), (4, (), False), (3, ("-q", "x"), False)],
)
def test_weights_of_two_or_three_bits_are_served_on_our_kernels(tmp_path, bits, options, added):
    config = {
        "quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": bits}}}}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = VllmCommand("vllm", options).arguments(str(tmp_path), "auto", 1)
    assert ("--quantization rac" in " ".join(command)) is added


@pytest.mark.parametrize(
    ("version", "options", "added"),
    [
        ("0.32.0+cpu", (), True),
        ("0.32.0", (), False),
        ("", (), False),
        ("0.32.0+cpu", ("--enable-chunked-prefill",), False),
        ("0.32.0+cpu", ("--max-model-len=8192",), True),
    ],
)
def test_a_vllm_for_cpus_reads_prompts_whole(tmp_path, version, options, added):
    """It would end at the first prompt that it reads in parts: our requests have seeds."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n")
    python.chmod(0o700)
    command = VllmCommand(str(tmp_path / "vllm"), options).arguments("model", "auto", 1)
    assert ("--no-enable-chunked-prefill" in command) is added
    assert command[-len(options) :] == list(options) or not options


@pytest.mark.parametrize(
    "config", [None, "{", "[]", '{"quantization_config": {"config_groups": {"a": 1}}}']
)
def test_a_model_whose_config_says_nothing_gets_no_option(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert "rac" not in VllmCommand("vllm").arguments(str(tmp_path), "auto", 1)


def test_which_vllm(tmp_path):
    path = fake_vllm.install(tmp_path)
    found = VllmCommand.from_environment({"PATH": str(tmp_path)})
    assert (found.path, found.options, found.timeout) == (str(path), (), 1800)
    variables = {
        "RAC_VLLM": str(path),
        "RAC_VLLM_OPTIONS": "--a 1 --b 'x y'",
        "PATH": "/nowhere",
    }
    assert VllmCommand.from_environment(variables) == VllmCommand(
        str(path), ("--a", "1", "--b", "x y")
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "no vllm on the PATH; .* name it with RAC_VLLM=/path"),
        ({"RAC_VLLM": "/no/vllm"}, "RAC_VLLM='/no/vllm' is no command that can be run"),
        (
            {"RAC_VLLM": "sh", "RAC_VLLM_OPTIONS": "--a 'x"},
            "RAC_VLLM_OPTIONS=.*No closing quotation",
        ),
    ],
)
def test_wrong_variables_are_named(variables, message):
    path = "/bin:/usr/bin" if "sh" in variables.values() else "/nowhere"
    with pytest.raises(RacError, match=message):
        VllmCommand.from_environment({"PATH": path, **variables})


def test_an_environment_without_our_plugin_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RAC_VLLM", str(fake_vllm.install(tmp_path)))
    check_serving()  # there is no python to ask beside it
    python = tmp_path / "python"
    for code in (0, 1):
        python.write_text(f'#!/bin/sh\n[ "$1" = -I ] && exit {code}\n')
        python.chmod(0o755)
        if code == 0:
            check_serving()
            continue
        with pytest.raises(
            RacError,
            match=r"lacks rac-modifier, whose plugin reads packed checkpoints; .*python -m pip install",
        ):
            check_serving()
