"""The demo removes no folder of the user; `make demo` runs it whole."""

import runpy
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "reasoner_demo.py"


def test_a_folder_that_is_there_is_refused_and_stays(tmp_path, monkeypatch, capsys):
    (tmp_path / "diary.txt").touch()
    monkeypatch.setattr(sys, "argv", ["reasoner_demo.py", "--out", str(tmp_path)])
    main = runpy.run_path(str(DEMO))["main"]
    monkeypatch.setitem(main.__globals__, "held_out_problems", None)  # nothing is measured
    with pytest.raises(SystemExit):
        main()
    assert "name a new folder" in capsys.readouterr().err
    assert (tmp_path / "diary.txt").exists()
