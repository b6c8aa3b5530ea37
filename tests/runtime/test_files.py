import fcntl
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rac_modifier.errors import RacError
from rac_modifier.runtime.files import (
    hold,
    lock,
    public_name,
    read_json,
    regular_file,
    remove_folder,
    text_without_paths,
    without_paths,
    write_json_atomic,
    write_text_atomic,
)


def test_round_trip_and_mode(tmp_path):
    path = tmp_path / "a.json"
    for obj in ({"a": [1, 2.5, None, "ä"]}, {}):
        write_json_atomic(path, obj)
        assert read_json(path) == obj
    assert path.read_text().endswith("\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(RacError, match="No space left"):
        write_text_atomic(path, "new")
    for obj in ({"a": float("nan")}, {"a": {1, 2}}):
        with pytest.raises(RacError, match="not JSON"):
            write_json_atomic(path, obj)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 100_000, "null", "3"])
def test_unreadable_json(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(RacError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "missing", "null\0byte"])
def test_a_file_that_cannot_be_read_to_its_end_is_refused(tmp_path, kind):
    path = tmp_path / kind
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
    with pytest.raises(RacError, match=r"^recipe .*: no regular file is there"):
        regular_file(path, "recipe")
    with pytest.raises(RacError, match="cannot be read as JSON"):
        read_json(path)
    (tmp_path / "a").write_text("{}")
    (tmp_path / "link").symlink_to("a")
    assert regular_file(tmp_path / "link", "recipe") == tmp_path / "link"


class Killed(BaseException):
    """Ends a run as a kill does."""


def test_a_kill_while_a_folder_is_removed_leaves_no_part_of_it(tmp_path, monkeypatch):
    folder = tmp_path / "state"

    def make() -> None:
        folder.mkdir()
        for number in range(3):
            (folder / f"{number}").write_text("")

    def half(path: Path, ignore_errors: bool) -> None:
        if path.exists():
            next(path.iterdir()).unlink()
            raise Killed

    make()
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            remove_folder(folder)
    assert not folder.exists()
    make()
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []
    remove_folder(folder)  # it is not there


def test_a_lock_is_had_once(tmp_path):
    (tmp_path / "a").touch()
    with (tmp_path / "a").open() as first, (tmp_path / "a").open() as second:
        assert lock(first.fileno(), tmp_path / "a", 0.0)
        assert not lock(second.fileno(), tmp_path / "a", 0.0)
        first.close()
        assert lock(second.fileno(), tmp_path / "a", 60.0)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    words = r"/a cannot be locked \(No locks available\); name one on a file system that has locks"
    with (tmp_path / "a").open("w") as file, pytest.raises(RacError, match=words):
        lock(file.fileno(), tmp_path / "a", 0.0)


HOLDER = """
import os, sys
from pathlib import Path
from rac_modifier.runtime.files import hold
if sys.argv[2:]:
    os.getpid = lambda: int(sys.argv[2])
lock = hold(Path(sys.argv[1]), "")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("same_id", [False, True], ids=["", "with the process id of this one"])
def test_another_process_keeps_this_one_out_of_a_folder_until_it_ends(tmp_path, same_id):
    """Containers that share a folder repeat process ids."""
    folder, pipe = tmp_path / "rac_recovery" / "model", subprocess.PIPE
    command = [sys.executable, "-c", HOLDER, str(folder), *[str(os.getpid())] * same_id]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "held\n"
        says = rf"process {os.getpid() if same_id else other.pid}; wait for it, or name another$"
        with pytest.raises(RacError, match=says):
            hold(folder, "name another", take_over=True)
        other.kill()
        other.wait()
        hold(folder, "").close()  # a killed process holds nothing


def test_a_run_yields_a_folder_to_a_later_run_of_its_process_if_that_asks(tmp_path):
    first = hold(tmp_path, "")
    with pytest.raises(RacError, match=f"in use by process {os.getpid()}; wait"):
        hold(tmp_path, "")
    written = (tmp_path / ".lock").stat().st_mtime_ns
    second = hold(tmp_path, "", take_over=True)
    assert (first.closed, second.closed) == (True, False)
    assert (tmp_path / ".lock").stat().st_mtime_ns == written
    (tmp_path / "file").write_text("")
    with pytest.raises(RacError, match=r"cannot be written to \(.*\); name another$"):
        hold(tmp_path / "file" / "state", "name another")


PROMPT = "/no_think You are a careful math/physics tutor."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("../Qwen3-8B", "../Qwen3-8B"),
        ("/data/models/Qwen3-8B/", "Qwen3-8B"),
        ("~/models/Qwen3-8B", "Qwen3-8B"),
        ("C:\\Users\\me\\Qwen3-8B", "Qwen3-8B"),
        ("file:///data/x.jsonl", "x.jsonl"),
        ("/home/me/hub/models--Qwen--Qwen3-8B/snapshots/b968826d", "Qwen/Qwen3-8B"),
        ("/venv/lib/rac_modifier/reasoner/assets", "reasoner"),
        ("/no_think", "/no_think"),
        ("/no_think " + "word " * 99, "/no_think " + "word " * 99),
        (PROMPT, PROMPT),
        ("/home/A User/models/a", "a"),
        ("C:\\My models\\a", "a"),
        ("https://host/v1/models", "https://host/v1/models"),
    ],
)
def test_public_name(name, expected):
    assert public_name(name) == expected


def test_a_record():
    record = {
        "base_model": "/home/me/models/a",
        "modifier": {"store": "/home/me/models/a/traces.jsonl", "seed": 3, "suffix": "/no_think"},
        "notes": ["traces of /home/me/models/a/traces.jsonl", None, 0.5, True],
        "prompts": {"template": "chat", "system_prompt": PROMPT},
        "/home/me/models/a": ("x",),
    }
    assert without_paths(record) == {
        "base_model": "a",
        "modifier": {"store": "traces.jsonl", "seed": 3, "suffix": "/no_think"},
        "notes": ["traces of traces.jsonl", None, 0.5, True],
        "prompts": {"template": "chat", "system_prompt": PROMPT},
        "a": ["x"],
    }
    assert record["modifier"]["store"].startswith("/home")


def test_a_folder_with_a_space_in_its_first_name_is_a_path_where_it_exists(monkeypatch):
    assert public_name("/My drive/models/a") == "/My drive/models/a"
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    assert public_name("/My drive/models/a") == "a"


def test_a_text_keeps_its_form():
    text = "# mine\nstore:   /data/t.jsonl # there\nmodel: a/b\n"
    parsed = {"store": "/data/t.jsonl", "model": "a/b"}
    assert text_without_paths(text, parsed) == "# mine\nstore:   t.jsonl # there\nmodel: a/b\n"
