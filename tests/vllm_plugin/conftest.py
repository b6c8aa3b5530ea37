"""What the plugin logs, for the tests of this folder."""

import pytest


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The lines; vLLM configures logging anew in each engine, which drops handlers."""
    from rac_modifier.vllm_plugin import config

    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(config.logger, level, lambda text, *args: lines.append(text % args))
    return lines
