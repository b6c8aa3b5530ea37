import pytest

from rac_modifier.settings.calibration import TraceSettings
from rac_modifier.settings.problems import ProblemSource


@pytest.mark.parametrize(
    ("source", "generator", "file"),
    [
        ("arithmetic", True, False),
        ("reasoning-gym:chain_sum", True, False),
        ("folder/problems.parquet", False, True),
        ("open-r1/OpenR1-Math-220k", False, False),
    ],
)
def test_kinds_of_sources(source, generator, file):
    made = ProblemSource(source=source)
    assert (made.is_generator, made.is_file) == (generator, file)
    assert TraceSettings().named(source).problems == made
