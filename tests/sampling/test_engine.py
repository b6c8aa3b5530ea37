"""The record of an engine, which stands in the header of every store."""

import json

import pytest
from pydantic import ValidationError

from rac_modifier.sampling.engine import EngineRecord, Probe


def test_a_record_is_read_back_from_json():
    probe = Probe(prompt_ids=(1, 2), completion_ids=(3,))
    record = EngineRecord(kind="openai", served_model="m", root="/models/m", probes=(probe,))
    assert EngineRecord(**json.loads(json.dumps(record.model_dump()))) == record


@pytest.mark.parametrize(
    "fields", [{"kind": "vllm"}, {"url": "http://a"}, {"probes": [{"prompt_ids": [1]}]}]
)
def test_a_record_of_another_form_is_refused(fields):
    with pytest.raises(ValidationError):
        EngineRecord(**fields)
