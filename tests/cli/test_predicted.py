"""`rac inspect --device`: predicted times as a table and as JSON, never without the word."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rac_modifier.checkpoint.inspect import CheckpointReport, ModuleRow
from rac_modifier.cli.predicted import NOT_MEASURED, prediction_figures, render_prediction
from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda.cards import card_of
from rac_modifier.kernels.cuda.measured import Measured, MeasuredRow
from rac_modifier.kernels.predicted import Prediction, predict_checkpoint
from tests.kernels.test_predicted import planned


def prediction(*names: str, packed: bool = True) -> Prediction:
    modules = tuple(
        ModuleRow(
            name,
            8192,
            8192,
            "BF16",
            "sparse-24-bitmask" if packed else "dense",
            0.5,
            1,
            1,
            reason="not pruned",
        )
        for name in names
    )
    plan = [planned(name, 8192, 8192) for name in names if packed]
    return predict_checkpoint(
        CheckpointReport(Path("out"), "dense", modules, 0, None), plan, card_of("l4"), 8
    )


def test_a_row_per_kind_and_one_for_the_step():
    """By hand: 8192^2 weights of 1.125 bytes, 8 tokens in and out, at 85 % of 300 GB/s, and 2 us."""
    found = prediction("a.o_proj", "b.o_proj")
    head, columns, layer, all_, *notes = render_prediction(found).splitlines()
    assert head == f"On one L4, a step of 8 tokens, RAC_GPU_KERNELS=on, bfloat16: {NOT_MEASURED}"
    assert columns.split("  ")[0] == "layer"
    us = 1e6 * (8192 * 8192 * 1.125 + 2 * 8 * 16384) / 0.3e12 / 0.85 + 2
    gain = (1e6 * (8192 * 8192 * 2 + 2 * 8 * 16384) / 0.3e12 / 0.85 + 2) / us
    assert re.split(r" {2,}", layer)[:7] == [
        "o_proj",
        "2",
        "8192x8192",
        "2:4",
        f"{us:.1f}",
        "memory",
        f"{gain:.2f}x",
    ]
    assert re.split(r" {2,}", all_)[:4] == ["all", "2", f"{2 * us:.1f}", f"{gain:.2f}x"]
    assert any("attention" in note for note in notes)


def test_what_runs_dense_has_its_reason():
    text = render_prediction(prediction("a.o_proj", packed=False))
    assert "o_proj: dense because not pruned" in text
    assert (
        "no layer runs on a GPU kernel; they take packed sparse weights in bfloat16, int8, fp8"
        in text
    )


def test_a_model_without_layers_has_no_step():
    assert "\nall " not in render_prediction(prediction())


def test_json_has_what_is_printed():
    found = prediction("a.o_proj", "b.o_proj")
    values = json.loads(json.dumps(prediction_figures(found), allow_nan=False))
    assert (values["note"], values["tokens"], values["card"]["name"]) == (NOT_MEASURED, 8, "l4")
    (layer,) = values["layers"]
    assert (layer["count"], layer["kernel"], layer["bound"]) == (2, "2:4", "memory")
    assert layer["us"] == layer["resources_us"]["memory"] + layer["resources_us"]["launch"]
    assert values["us"] == 2 * layer["us"]
    assert values["dense_us"]["fp8"] == 2 * layer["dense_us"]["fp8"]


def measured(*us: float, card: str = "l4", rows: int = 8192) -> Measured:
    """Of square layers on the 2:4 kernel with 8 tokens."""
    times = tuple(
        MeasuredRow("o", n * rows, n * rows, 8, "bf16", each) for n, each in enumerate(us, start=1)
    )
    return Measured("gpu.json", card_of(card), times)


def test_measured_times_stand_beside_the_predicted_ones():
    found = prediction("a.o_proj", "b.o_proj")
    alone = [re.split(r" {2,}", line) for line in render_prediction(found).splitlines()[1:4]]
    head, *table, counted, _ = render_prediction(found, measured(901.25)).splitlines()[:6]
    assert head.endswith(
        "RAC_GPU_KERNELS=on, bfloat16: us: predicted; measured us: gpu.json, by make gpu-check"
    )
    cells = [re.split(r" {2,}", line) for line in table]
    assert [row[:5] for row in cells[:2]] == [row[:5] for row in alone[:2]]
    assert [cells[0][5], cells[1][5]] == ["measured us", "901.2"]
    assert cells[2][2:4] == [alone[2][2], "1802.5"]  # two layers
    assert [row[6:] for row in cells[:2]] == [row[5:] for row in alone[:2]]
    assert counted == "measured us: of all rows"
    assert NOT_MEASURED not in render_prediction(found, measured(901.25))


def test_what_was_not_measured_has_a_dash_and_is_counted():
    found = prediction("a.o_proj", "b.lm_head")
    assert [layer.kernel for layer in found.layers] == ["2:4", "2:4"]
    half = replace(found, layers=(found.layers[0], replace(found.layers[1], rows=1000)))
    lines = render_prediction(half, measured(901.25)).splitlines()
    cells = {line.split()[0]: re.split(r" {2,}", line) for line in lines[2:5]}
    assert (cells["o_proj"][5], cells["lm_head"][5], cells["all"][3]) == ("901.2", "-", "-")
    assert lines[5].startswith(
        "measured us: 1 row has none (-), for its shape, kernel or number of tokens"
    )
    values = json.loads(json.dumps(prediction_figures(half, measured(901.25)), allow_nan=False))
    assert [layer["measured_us"] for layer in values["layers"]] == [901.25, None]
    assert values["note"] == "predicted; measured_us by make gpu-check, gpu.json"
    assert all("measured_us" not in layer for layer in prediction_figures(half)["layers"])


def test_times_of_another_card_or_of_no_layer_are_refused_by_name():
    found = prediction("a.o_proj")
    for show in (render_prediction, prediction_figures):
        with pytest.raises(
            RacError,
            match=r"gpu\.json was measured on H100 SXM, and times are predicted for L4; give --device h100, or the file",
        ):
            show(found, measured(9.0, card="h100"))
        with pytest.raises(
            RacError,
            match="has no time of any of these layers with 8 tokens per step; it has layers of 64x64, 128x128 with 8",
        ):
            show(found, measured(9.0, 8.0, rows=64))


def test_the_command_predicts_in_place_of_the_cpus_plan(rac, sparse_folder):
    code, stdout, _ = rac("inspect", sparse_folder, "--device", "h100", "--tokens", "16")
    assert code == 0
    assert (
        f"On one H100 SXM, a step of 16 tokens, RAC_GPU_KERNELS=on, bfloat16: {NOT_MEASURED}"
        in stdout
    )
    assert re.search(
        r"^down_proj +\d+ +\d+x\d+ +dense ", stdout, re.MULTILINE
    )  # so small that launches decide
    assert re.search(
        r"^ *down_proj: dense because it is predicted on H100 SXM: ", stdout, re.MULTILINE
    )
    assert "lm_head: dense because" in stdout
    assert "this machine's CPU" not in stdout
    code, stdout, _ = rac("inspect", sparse_folder, "--device", "h100", "--json")
    assert code == 0
    assert json.loads(stdout)["predicted"]["note"] == NOT_MEASURED
