"""What a run records of each module, and a module that it never reaches."""

import pytest

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.run import Run
from tests.llmcompressor.conftest import record_of
from tests.tiny import TOKENS, linears


def test_modules_that_no_token_reached_are_an_error(prune, monkeypatch):
    original = Run.prune

    def all_but_up(self, groups, per_call=None):
        original(self, [g for g in groups if "up_proj" not in self.names[g.modules[-1]]])

    monkeypatch.setattr(Run, "prune", all_but_up)
    with pytest.raises(RacError, match=r"4 modules saw no calibration token, the first is .*gate"):
        prune()


def test_every_module_and_every_group_has_a_row_in_the_record(prune, pruned, tmp_path):
    prune(output_dir=tmp_path / "layer", preset="paper")
    by_layer = record_of(tmp_path / "layer")
    assert pruned.record["method"] == "alps"
    why = {"order": "group", "why": "order: auto", "reconstruct": "dense"}
    assert pruned.record["order"] == why
    for record in (pruned.record, by_layer):
        assert {row["name"] for row in record["modules"]} == set(linears(pruned.model))
        for row in record["modules"]:
            assert row["tokens"] == TOKENS
            assert row["sparsity"] == pytest.approx(0.5, abs=0.01)
            assert 0 < row["relative_error"] < 1
        assert record["time"]["seconds"] > 0
