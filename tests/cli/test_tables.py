import pytest

from rac_modifier.cli.tables import render_table

HEAD = ("model", "accuracy", "tokens")
ROWS = [("dense", "100.0%", "8"), ("a much longer label", "5.0%", "1,234")]


def test_text_is_aligned_to_the_left_and_numbers_to_the_right():
    assert render_table(HEAD, ROWS).splitlines() == [
        "model                accuracy  tokens",
        "dense                  100.0%       8",
        "a much longer label      5.0%   1,234",
    ]


def test_several_columns_of_text():
    assert render_table(("a", "b"), [("1", "2"), ("333", "44")], left=2).splitlines() == [
        "a    b",
        "1    2",
        "333  44",
    ]


def test_markdown_has_equally_many_cells_in_each_line():
    lines = render_table(HEAD, [("a|b", "1", "2"), *ROWS], markdown=True).splitlines()
    assert len(lines) == 5
    assert {line.replace(r"\|", "").count("|") for line in lines} == {4}
    assert set(lines[1]) <= set("|-: ")
    assert lines[2].startswith(r"| a\|b ")


def test_cells_are_text_and_stay_on_one_line():
    long = "x" * 3000
    table = render_table(
        ("[bold]h[/bold]", "b"), [("[red]r[/red] :smile:", f"{long}\nsecond line")]
    )
    head, row = table.splitlines()
    assert head.startswith("[bold]h[/bold]")
    assert row == f"[red]r[/red] :smile:  {long} second line"


def test_a_table_without_rows_is_its_head():
    assert render_table(HEAD, []) == "model  accuracy  tokens"


@pytest.mark.parametrize("name", ["FORCE_COLOR", "COLUMNS"])
def test_the_terminal_does_not_change_the_text(monkeypatch, name):
    expected = render_table(HEAD, ROWS)
    monkeypatch.setenv(name, "10")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert render_table(HEAD, ROWS) == expected
    assert "\x1b" not in expected
