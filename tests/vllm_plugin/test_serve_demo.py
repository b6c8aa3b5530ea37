"""`examples/serve_demo.py` in the serving environment, which has none of the compressing environment's packages."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_demo.py"


pytest.importorskip("openai", reason="vLLM brings it; the compressing environment may lack it")


def test_it_starts_and_checks_answers_with_what_serving_has(monkeypatch, capsys):
    monkeypatch.setitem(
        sys.modules, "pebble", None
    )  # importing it fails, where it is installed too
    for name in ("rac_modifier.problems.answers", "rac_modifier.problems.answer_checker"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "argv", ["serve_demo.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert ended.value.code == 0
    assert "vllm serve" in capsys.readouterr().out
    is_correct = runpy.run_path(str(EXAMPLE), run_name="example")["is_correct"]
    assert is_correct(r"so</think> \boxed{42}", "42")
    assert not is_correct(r"so</think> \boxed{41}", "42")
