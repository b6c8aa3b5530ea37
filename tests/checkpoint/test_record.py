from __future__ import annotations

import json

from rac_modifier.checkpoint.record import environment


def test_environment_is_json_and_complete() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert {
        "rac_modifier",
        "torch",
        "transformers",
        "llmcompressor",
        "python",
        "platform",
        "cpu_count",
    } <= found.keys()
    assert found["rac_modifier"]
    assert found["python"].count(".") == 2
