"""Tables, and the next step after Ctrl-C, which tests/cli/test_interrupt.py presses."""

from rac_modifier.cli.options import render_table, saving_step

HEAD = ("model", "accuracy", "note")
ROWS = [("dense", "100.0%", "8"), ("a much longer label", "5.0%", "[red]")]


def test_text_is_aligned_to_the_left_and_numbers_to_the_right():
    assert render_table(HEAD, ROWS).splitlines() == [
        "model                accuracy  note",
        "dense                  100.0%  8",
        "a much longer label      5.0%  [red]",
    ]
    assert render_table(("a", "b"), [("1", "2"), ("333", "44")], text_columns=2).splitlines() == [
        "a    b",
        "1    2",
        "333  44",
    ]
    assert render_table(HEAD, []) == "model  accuracy  note"


def test_control_characters_are_escaped_and_a_cell_stays_on_one_line():
    long = "x" * 3000
    _, row = render_table(HEAD, [("a\x1b[2K", "1", f"{long}\nforged line")]).splitlines()
    assert row == f"a\\x1b[2K         1  {long}\\nforged line"


def test_what_is_said_of_a_folder_that_was_being_saved_to(tmp_path):
    steps = [saving_step(path, "they are kept") for path in (None, tmp_path / "out", tmp_path)]
    assert set(steps) == {"they are kept; run the same command again"}
    (tmp_path / "README.md").touch()
    again = f"{tmp_path} is not complete: remove it, and run the same command again"
    assert saving_step(tmp_path, "they are kept") == again
    (tmp_path / "config.json").touch()
    assert saving_step(tmp_path).startswith(f"{tmp_path} holds the whole model; if it has")
