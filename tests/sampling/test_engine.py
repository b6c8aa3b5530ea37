"""The record of an engine, which stands in the header of every store."""

import json

import pytest
from pydantic import ValidationError

from rac_modifier.sampling.engine import EngineRecord, Probe


def test_a_record_is_read_back_from_json():
    probe = Probe(prompt_ids=(1, 2), completion_ids=(3,))
    record = EngineRecord(kind="openai", served_model="m", root="/models/m", probes=(probe,))
    assert EngineRecord(**json.loads(json.dumps(record.model_dump()))) == record


def test_a_store_without_a_record_was_filled_in_process():
    """Headers that were written before there were servers."""
    assert EngineRecord().model_dump() == {
        "kind": "transformers",
        "served_model": None,
        "root": None,
        "probes": (),
    }


@pytest.mark.parametrize(
    "fields", [{"kind": "vllm"}, {"url": "http://a"}, {"probes": [{"prompt_ids": [1]}]}]
)
def test_a_record_of_another_form_is_refused(fields):
    with pytest.raises(ValidationError):
        EngineRecord(**fields)
