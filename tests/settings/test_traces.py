import pytest

from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import TraceSettings


def test_a_named_source_has_its_own_problems_and_store():
    settings = TraceSettings(
        store="all.jsonl",
        sampling={"samples_per_problem": 2},
        select={"finished": True},
        sources={
            "math": {"problems": {"source": "reasoning-gym:gcd"}, "select": {"max_tokens": 3}},
            "code": {"problems": {"source": "code.jsonl"}},
        },
    )
    assert settings.named(None) is settings
    for name, source, finished in (
        ("math", "reasoning-gym:gcd", False),
        ("code", "code.jsonl", True),
        ("org/data", "org/data", True),
    ):
        named = settings.named(name)
        assert (named.store, named.problems.source) == (None, source)
        assert (named.select.finished, named.sampling) == (finished, settings.sampling)
    with pytest.raises(RacError, match=r"traces:maths, .* traces\.sources \(math, code\)"):
        settings.named("maths")


def test_a_source_has_its_own_prompt():
    settings = TraceSettings(
        sampling={"system_prompt": "Reason.", "temperature": 0.5},
        sources={
            "plain": {"problems": {}, "thinking": False},
            "brief": {"problems": {}, "system_prompt": ""},
        },
    )
    plain, brief = (settings.named(name).sampling for name in ("plain", "brief"))
    assert (plain.thinking, plain.system_prompt, plain.temperature) == (False, "Reason.", 0.5)
    assert (brief.thinking, brief.system_prompt, brief.temperature) == (True, "", 0.5)
    bare = TraceSettings(sampling={"template": "none"}, sources=settings.sources)
    with pytest.raises(RacError, match="has no system_prompt"):
        bare.named("brief")
