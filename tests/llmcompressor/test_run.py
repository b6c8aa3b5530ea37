"""A module that a run never reaches."""

import pytest

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.run import Run


def test_modules_that_no_token_reached_are_an_error(prune, monkeypatch):
    original = Run.prune

    def all_but_up(self, groups, per_call=None):
        original(self, [g for g in groups if "up_proj" not in self.names[g.modules[-1]]])

    monkeypatch.setattr(Run, "prune", all_but_up)
    with pytest.raises(RacError, match=r"4 modules saw no calibration token, the first is .*gate"):
        prune()
