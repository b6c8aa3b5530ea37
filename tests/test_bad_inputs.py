"""What a user can do wrong, and what the message must say."""

import pytest

from rac_modifier.errors import RacError
from tests.bad_inputs import (
    checkpoints,
    commands,
    packing,
    problems,
    recipes,
    runs,
    settings,
    stores,
)
from tests.bad_inputs.bench import Bench

MODULES = (recipes, settings, problems, stores, runs, checkpoints, packing, commands)
CASES = [case for module in MODULES for case in module.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.did)
def test_the_message_says_what_is_wrong(case, tiny_folder, trace_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench = Bench(tiny_folder, trace_store, tmp_path, monkeypatch)
    with pytest.raises(RacError) as caught:
        case.run(bench)
    assert case.says in str(caught.value)
    assert len(str(caught.value)) < 10_000


def test_no_case_is_there_twice():
    assert len({c.did for c in CASES}) == len(CASES) >= 25
