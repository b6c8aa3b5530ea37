from __future__ import annotations

from pathlib import Path

import pytest

from rac_modifier.machine_paths import public_name, text_without_paths, without_paths


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("models/Qwen3-8B", "models/Qwen3-8B"),
        ("../Qwen3-8B", "../Qwen3-8B"),
        ("/data/models/Qwen3-8B", "Qwen3-8B"),
        ("/data/models/Qwen3-8B/", "Qwen3-8B"),
        (Path("/data/models/Qwen3-8B"), "Qwen3-8B"),
        ("~/models/Qwen3-8B", "Qwen3-8B"),
        ("C:\\Users\\me\\Qwen3-8B", "Qwen3-8B"),
        ("file:///data/x.jsonl", "x.jsonl"),
        (
            "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/b968826d",
            "Qwen/Qwen3-8B",
        ),
        ("/venv/lib/python3.11/site-packages/rac_modifier/reasoner/assets", "reasoner"),
        ("/no_think", "/no_think"),
        ("https://host/v1/models", "https://host/v1/models"),
        ("re:.*/q_proj", "re:.*/q_proj"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_public_name(name: str | Path, expected: str) -> None:
    assert public_name(name) == expected


def test_a_path_of_one_name_that_exists(tmp_path: Path) -> None:
    assert public_name("/tmp" if Path("/tmp").exists() else str(tmp_path)) in ("tmp", tmp_path.name)


def test_a_record() -> None:
    record = {
        "base_model": "/home/me/models/a",
        "modifier": {"store": "/home/me/models/a/traces.jsonl", "seed": 3, "suffix": "/no_think"},
        "notes": ["traces of /home/me/models/a/traces.jsonl", None, 0.5, True],
        "/home/me/models/a": ("x",),
    }
    assert without_paths(record) == {
        "base_model": "a",
        "modifier": {"store": "traces.jsonl", "seed": 3, "suffix": "/no_think"},
        "notes": ["traces of traces.jsonl", None, 0.5, True],
        "a": ["x"],
    }
    assert record["modifier"]["store"].startswith("/home")


def test_a_text_keeps_its_form() -> None:
    text = "# mine\nstore:   /data/t.jsonl # there\nmodel: a/b\n"
    parsed = {"store": "/data/t.jsonl", "model": "a/b"}
    assert text_without_paths(text, parsed) == "# mine\nstore:   t.jsonl # there\nmodel: a/b\n"
