"""The run record: versions, and activations that were chosen later."""

import json

from rac_modifier.checkpoint.card import environment, record_activations


def test_environment_is_json_and_complete():
    versions = environment()
    assert json.loads(json.dumps(versions)) == versions
    names = {"torch", "transformers", "llmcompressor", "python", "platform", "cpu_count"}
    assert names <= versions.keys()
    assert versions["rac_modifier"]


def test_activations_of_a_model_with_and_without_a_run_record(tmp_path):
    config, record = tmp_path / "config.json", tmp_path / "rac_run.json"
    config.write_text("{}")
    record.write_text('{"method": "alps"}')
    record_activations(tmp_path, ["b", "a"], {"source": str(tmp_path / "problems.jsonl")})
    assert json.loads(config.read_text())["rac_sparsity"]["int8_activations"] == ["a", "b"]
    activations = {"source": "problems.jsonl"}
    assert json.loads(record.read_text()) == {"method": "alps", "activations": activations}
    record.unlink()
    record_activations(tmp_path, [], {})
    assert json.loads(config.read_text())["rac_sparsity"]["int8_activations"] == []
    # with a record, `rac eval --card` would take it for a model of rac
    assert not record.exists()
