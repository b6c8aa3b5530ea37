"""A run of two processes of which one is killed, 20 times: at any moment, and always with the end of an undisturbed run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.llmcompressor import killed_ranks
from tests.llmcompressor.killed_ranks import AFTER, BEFORE, MOMENTS, SAVING, WRITING, Kill, table
from tests.llmcompressor.test_several_processes import result

KILLS = 20


def killed(rank: int, moment: str, **changes: Any) -> Kill:
    return Kill(
        **{
            "rank": rank,
            "moment": moment,
            "kept": 3,
            "pruned": 3,
            "half": False,
            "other": (1,),
            **changes,
        }
    )


def test_the_table_counts_kills_by_moment_and_process():
    rows = [
        killed(0, WRITING, pruned=5, half=True),
        killed(0, WRITING, other=(-15,)),
        killed(1, BEFORE),
    ]
    assert table(rows, 2)[2:] == [
        "| process 1 of 2 | before the first file | 1 | 0 | 0 | 1 (1) |",
        "| process 0 of 2 | while a file is written | 2 | 2 | 1 | -15 (1), 1 (1) |",
    ]
    assert table([killed(0, SAVING, other=())], 1)[2:] == [
        "| process 0 of 1 | while the result is saved | 1 | 0 | 0 | - |"
    ]


@pytest.mark.slow
def test_twenty_kills_of_one_of_two_processes_change_nothing(tmp_path: Path):
    ran = forked.run(killed_ranks.main, [str(KILLS), "2"], tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    kills = told["kills"]
    assert len(kills) == KILLS
    moments, ranks = (
        Counter(kill["moment"] for kill in kills),
        Counter(kill["rank"] for kill in kills),
    )
    assert all(moments[moment] >= 2 for moment in MOMENTS), moments
    assert min(ranks[0], ranks[1]) >= 4, ranks
    # the process that writes can lose the group that it has pruned and not yet written, and nothing else
    assert all(kill["lost"] <= 1 for kill in kills), kills
    assert all(
        kill["lost"] == 0 for kill in kills if kill["rank"] == 1 or kill["moment"] == SAVING
    ), kills
    assert any(kill["kept"] > 2 for kill in kills if kill["moment"] == AFTER)
    # 0: it had nothing more to say to the other; -15: it was joining, where gloo does not notice, and torchrun's agent ends it
    assert {code for kill in kills for code in kill["other"]} <= {0, 1, -15}, (
        "a process hung or died of another signal"
    )
    assert told["told"], "no half saved result was met"
    assert all(told["told"]), "a half saved result was neither gone on from nor refused"
    assert len(told["lives"]) >= 3
    undisturbed = result(tmp_path / "undisturbed")
    for life in told["lives"]:
        assert result(tmp_path / life) == undisturbed
        assert not (tmp_path / f"{life}.unfinished").exists()
