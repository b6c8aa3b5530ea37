"""The file of `rac eval --json FILE`, written and read."""

import json
from dataclasses import replace

import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation.results import check_json_out, read_results
from rac_modifier.evaluation.stopping import Loop
from rac_modifier.settings.sampling import SamplingSettings
from tests.evaluation.test_results import result, row


def test_results_come_back_from_a_file_and_those_of_another_version_are_named(tmp_path):
    looping = row(correct=False, kind="looping")
    ending = replace(looping.ending, loop=Loop(3, 2, "tokens"))
    found = result([row(), replace(looping, ending=ending)])
    path = tmp_path / "dense.json"
    prompt = {"template": "chat", "system_prompt": "Be brief.", "thinking": True}

    def read(content):
        path.write_text(json.dumps({"prompt": prompt, **content}))
        return read_results(path, SamplingSettings(system_prompt="Be brief.", **sampled))

    sampled = {"temperature": 0.6, "top_p": 0.95}
    values = found.model_dump()
    assert read({"results": [values], "protocol": sampled}) == [found]
    with pytest.raises(RacError, match=r"top-p 0\.9 there, and 0\.95 here; .*\(--top-p\)"):
        read({"results": [values], "protocol": {"top_p": 0.9}})
    sampled = {"temperature": 0.0}
    assert read({"results": [values], "protocol": {"top_p": 0.9}}) == [found]
    for damaged in ({"cap": "x"}, {"limit": 3}, {"endings": {"a": [{"loop": 1}]}}):
        with pytest.raises(RacError, match=r"dense\.json: no evaluation result \("):
            read({"results": [values | damaged]})
    with pytest.raises(RacError, match=r"accuracies; write it with: rac eval DENSE --json FILE$"):
        read({"divergence": []})
    with pytest.raises(RacError, match="no evaluation result"):
        read({"results": [values], "prompt": None})
    for change, says in (({"thinking": False}, "thinking off"), ({"system_prompt": None}, "no sy")):
        with pytest.raises(RacError, match=rf"be paired: .*{says}.* there, and .* here; evaluate"):
            read({"results": [values], "prompt": prompt | change})


def test_only_earlier_results_may_be_overwritten(tmp_path, monkeypatch):
    new, file = tmp_path / "new.json", tmp_path / "r.json"
    for text in ("", '{"prompt": {}, "results": []}', '{"prompt": {}, "divergence": []}'):
        file.write_text(text)
        check_json_out(file)
    for text in ('{"model_type": "qwen3"}', '{"divergence": 1}', "notes", "[1]"):
        file.write_text(text)
        with pytest.raises(RacError, match=r"r\.json: is there, and not of an earlier rac eval"):
            check_json_out(file)
    with pytest.raises(RacError, match="is there, and not of an earlier rac eval; name a new file"):
        check_json_out(tmp_path)
    with pytest.raises(RacError, match="its folder does not exist; create it first"):
        check_json_out(tmp_path / "none" / "r.json")
    check_json_out(new)
    with pytest.raises(RacError, match=r"r\.json: --baseline reads this file; name a new one"):
        check_json_out(tmp_path / "." / "r.json", tmp_path / "r.json")
    monkeypatch.setattr("os.access", lambda folder, mode: folder != tmp_path)
    with pytest.raises(RacError, match=r"new\.json: its folder cannot be written to"):
        check_json_out(new)
