"""The JSON of `make gpu-check` is read, what is wrong with one is said, and layers are found by what they run on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda.layout import ALL, INT4, INT4_FP32_SCALES, UNSTRUCTURED
from rac_modifier.kernels.cuda.measured import (
    CONTENDERS,
    Measured,
    MeasuredRow,
    contender_of,
    read_measured,
)
from rac_modifier.kernels.cuda.predict import DENSE

ROW = {
    "layer": "o",
    "rows": 4096,
    "columns": 4096,
    "tokens": 8,
    "contender": "int4 g128",
    "us": 5.5,
}


def record(path: Path, **changes: object) -> Path:
    """As benchmarks/gpu_kernels.py writes it; tests/benchmarks/test_gpu_kernels.py has its keys."""
    other = {"faster": 2.0, "GB/s": 1500.0}
    found = {
        "device": "NVIDIA H100 80GB HBM3",
        "torch": "2.14.0",
        "finished": True,
        "programs": [
            {"format": "bf16", "program": "rac_24_bf16_r1_t1", "tokens": 13, "error": 0.4}
        ],
        "checked": [],
        "times": [ROW | other, ROW | other | {"tokens": 16, "us": 6}],
        "missing": {"dense int4": "vLLM has no Marlin here"},
        "left_out": [],
    }
    path.write_text(json.dumps(found | changes))
    return path


def test_times_are_found_by_shape_tokens_and_contender(tmp_path):
    found = read_measured(record(tmp_path / "gpu.json"))
    assert (found.source, found.card.name) == ("gpu.json", "h100")
    assert found.times == (MeasuredRow(**ROW), MeasuredRow(**(ROW | {"tokens": 16, "us": 6})))
    assert found.us(4096, 4096, 8, "int4 g128") == 5.5
    assert found.us(4096, 4096, 16, "int4 g128") == 6
    for other in [
        (4096, 4096, 8, "int4 g64"),
        (4096, 4096, 1, "int4 g128"),
        (4096, 14336, 8, "int4 g128"),
    ]:
        assert found.us(*other) is None
    assert Measured("x", found.card, ()).us(4096, 4096, 8, None) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"device": "NVIDIA T4"},
            r'device "NVIDIA T4" is not in the table of cards, which has NVIDIA A100',
        ),
        ({"device": None}, r'device "None" is not in the table'),
        ({"times": []}, r"nothing was timed \(the run ended before\); run make gpu-check again"),
        ({"times": None, "error": "bf16: wrong by 3"}, r"nothing was timed \(bf16: wrong by 3\)"),
        ({"times": {"o": 1}}, "times: dict in place of a list"),
        ({"times": [ROW, 5]}, r"times\[1\]\.layer: None; run make gpu-check of this version again"),
        (
            {"times": [{k: v for k, v in ROW.items() if k != "rows"}]},
            r"times\[0\]\.rows: None; run make gpu-check",
        ),
        ({"times": [ROW | {"us": float("nan")}]}, r"times\[0\]\.us: nan"),
        ({"times": [ROW | {"us": 0}]}, r"times\[0\]\.us: 0; "),
        ({"times": [ROW | {"us": True}]}, r"times\[0\]\.us: True"),
        ({"times": [ROW | {"tokens": 8.0}]}, r"times\[0\]\.tokens: 8\.0"),
        ({"times": [ROW | {"contender": 3}]}, r"times\[0\]\.contender: 3"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, changes, problem):
    path = record(tmp_path / "gpu.json", **changes)
    with pytest.raises(RacError, match=rf"gpu\.json: {problem}"):
        read_measured(path)


def test_a_file_that_is_none_is_an_error(tmp_path):
    with pytest.raises(
        RacError, match=r"cannot be read as JSON .*; give the JSON that make gpu-check wrote"
    ):
        read_measured(tmp_path / "gpu.json")


def test_every_layout_has_one_name_and_every_other_name_is_a_dense_format():
    layouts = [each for each in CONTENDERS.values() if not isinstance(each, str)]
    assert sorted(map(repr, layouts)) == sorted(map(repr, ALL))
    assert {each for each in CONTENDERS.values() if isinstance(each, str)} == set(DENSE)


def test_a_layer_is_named_as_the_check_names_it():
    assert contender_of(INT4[128], 0.5, 2.0) == "int4 g128"
    assert contender_of(INT4[64], 0.4, 2.0) == "int4 g64"  # 2:4: the bytes are those of half
    assert contender_of(INT4_FP32_SCALES[128], 0.5, 2.0) == "int4 g128 fp32 scales"
    assert contender_of(UNSTRUCTURED, 0.5004, 2.0) == "unstructured bf16"
    assert contender_of(UNSTRUCTURED, 0.4, 2.0) is None  # half is stored in the check
    assert contender_of(None, 1.0, 2.0) == "dense bf16"
    assert contender_of(None, 1.0, 1.0) is None
