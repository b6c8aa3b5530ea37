"""Servers that are known by address and name alone: their answers in a file, killed and resumed."""

import json
from dataclasses import replace

import pytest
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.evaluation.chat import evaluate_chat
from rac_modifier.evaluation.results import PairedDifference
from rac_modifier.problems.source import Problem
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from tests.sampling.fake_server import FakeServer, shorten_pauses

SUMS = [Problem(f"q{i}", f"{i}+1?", str(i + 1), "sum") for i in range(12)]
CAP = 100


def answer(body, longer=1):
    """The sum; an odd i is thought about without an end, and repeats from its third word on."""
    number = int(body["messages"][-1]["content"].partition("+")[0])
    message = {"reasoning_content": "Let me think", "content": f"\\boxed{{{number + 1}}}"}
    tokens, finish = 10 * longer, "stop"
    if number % 2 and longer > 1:
        message = {"reasoning": "So then. " + "wait, I check " * 30, "content": None}
        tokens, finish = CAP, "length"
    choice = {"message": message, "finish_reason": finish}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}


@pytest.fixture
def servers(monkeypatch):
    """Two servers; the second one's model writes twice as much, and loops on odd problems."""
    shorten_pauses(monkeypatch)
    dense, sparse = FakeServer(), FakeServer()
    dense.chat, sparse.chat = answer, lambda body: answer(body, longer=2)
    sparse.cards = [{"id": "2of4"}, {"id": "another"}]
    yield dense, sparse
    dense.close()
    sparse.close()


def ask(server, path, problems=SUMS, name=None, samples=1, **changes):
    values = {"temperature": 0.0, "top_p": 0.95, "top_k": 0, "max_new_tokens": CAP, **changes}
    return evaluate_chat(
        problems,
        engine=EngineSettings(base_urls=(server.url,), concurrency=3, model=name),
        sampling=SamplingSettings(samples_per_problem=samples, **values),
        path=path,
    )


def test_two_servers_are_compared_by_address_and_name(servers, tmp_path):
    dense = ask(servers[0], tmp_path / "a.jsonl")
    sparse = ask(servers[1], tmp_path / "b.jsonl", name="2of4")
    assert (dense.label, dense.accuracy, dense.mean_completion_tokens) == ("tiny", 1.0, 10)
    assert (sparse.label, sparse.accuracy, sparse.unfinished_share) == ("2of4", 0.5, 0.5)
    assert {ending.kind for ending in sparse.endings["q1"]} == {"looping"}
    (loop,) = [ending.loop for ending in sparse.endings["q1"]]
    assert (loop.begin, loop.period, loop.unit) == (3, 4, "words")
    assert [ending.closes for ending in sparse.endings["q0"]] == [True]
    assert 0 < sparse.endings["q0"][0].thinking_tokens < 20
    inflation = PairedDifference.of(dense, sparse).inflation
    assert (inflation.both_finish.answers, inflation.both_finish.ratio) == (6, 2.0)
    assert inflation.at_cap.ratio == (6 * 20 + 6 * CAP) / (12 * 10)
    assert {body["model"] for body in servers[1].bodies} == {"2of4"}


def test_with_thinking_off_a_text_without_the_tag_is_an_answer(servers, tmp_path):
    choice = {"message": {"content": "So \\boxed{1}."}, "finish_reason": "stop"}
    servers[0].chat = lambda body: {"choices": [choice], "usage": {"completion_tokens": 6}}
    result = ask(servers[0], tmp_path / "a.jsonl", SUMS[:1], thinking=False)
    (ending,) = result.endings["q0"]
    assert (ending.closes, ending.tokens, ending.thinking_tokens) == (True, 6, 0)


def test_reasoning_without_content_is_no_closed_thinking_with_thinking_off(servers, tmp_path):
    choice = {"message": {"reasoning": "So \\boxed{1}", "content": None}, "finish_reason": "length"}
    usage = {"completion_tokens": CAP}
    servers[0].chat = lambda body: {"choices": [choice], "usage": usage}
    for _ in range(2):  # asked, and read from the file
        result = ask(servers[0], tmp_path / "a.jsonl", SUMS[:1], thinking=False)
        (ending,) = result.endings["q0"]
        assert (ending.closes, ending.thinking_tokens) == (False, CAP)


def test_an_error_with_status_200_is_shown_without_the_key(servers, tmp_path, monkeypatch):
    monkeypatch.setenv("RAC_TEST_KEY", "sk-1234")
    servers[0].chat = lambda body: {"error": {"message": "over quota of sk-1234"}}
    engine = EngineSettings(base_urls=(servers[0].url,), api_key_env="RAC_TEST_KEY")
    sampling = SamplingSettings(temperature=0.0, max_new_tokens=CAP)
    with pytest.raises(RacError, match=r"no completion in the answer \(over quota of \*\*\*\)"):
        evaluate_chat(SUMS[:1], engine=engine, sampling=sampling, path=tmp_path / "a.jsonl")


def test_a_killed_evaluation_goes_on(servers, tmp_path):
    path, server = tmp_path / "a.jsonl", servers[0]
    result = ask(server, path, samples=2, temperature=0.6)
    assert (result.samples, len({body["seed"] for body in server.bodies})) == (2, 24)
    lines = path.read_bytes().splitlines(keepends=True)
    for count in (1, 7, 24):
        server.bodies.clear()
        path.write_bytes(b"".join(lines[:count]) + lines[0][:20])
        again = ask(server, path, samples=2, temperature=0.6)
        assert len(server.bodies) == 24 - count
        assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)
        assert again.endings == result.endings
    assert ask(server, path, SUMS[:5], samples=2, temperature=0.6).problems == 5


def test_a_failed_answer_ends_the_run_and_is_asked_again(servers, tmp_path):
    server, path = servers[0], tmp_path / "a.jsonl"
    server.fault = lambda _, body: "400" if body["messages"][-1]["content"] == "7+1?" else None
    with pytest.raises(RacError, match=rf"'q7#0' is missing \({server.url} answers 400.*kept in"):
        ask(server, path)
    kept = path.read_text().splitlines()
    assert len(kept) >= 5
    server.fault = lambda number, body: None
    assert ask(server, path).problems == 12
    lines = path.read_text().splitlines()
    assert lines[: len(kept)] == kept
    assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 12


@pytest.mark.parametrize(("content", "line"), [("other text", 1), ("{first}\n[1]\n", 2)])
def test_a_file_that_is_not_of_answers_is_refused_and_unchanged(servers, tmp_path, content, line):
    path = tmp_path / "a.jsonl"
    ask(servers[0], path, SUMS[:1])
    content = content.replace("{first}", path.read_text().splitlines()[0])
    path.write_text(content)
    with pytest.raises(RacError, match=f"line {line} is no answer"):
        ask(servers[0], path)
    assert path.read_text() == content
    with pytest.raises(RacError, match="cannot be opened"):
        ask(servers[0], tmp_path)


def test_another_server_seed_or_question_is_asked_anew_and_answers_stay(servers, tmp_path):
    path = tmp_path / "a.jsonl"
    ask(servers[0], path, SUMS[:1])
    ask(servers[0], path, SUMS[:1], seed=1)
    ask(servers[0], path, [replace(SUMS[0], question="5+1?")])
    servers[1].cards = servers[0].cards
    ask(servers[1], path, SUMS[:1])
    assert [len(server.bodies) for server in servers] == [3, 1]
    ask(servers[0], path, SUMS[:1])
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize("change", [{"root": "/models/other"}, {"meta": {"size": 7}}])
def test_another_model_behind_the_same_address_and_name_is_asked_anew(servers, tmp_path, change):
    server, path = servers[0], tmp_path / "a.jsonl"
    ask(server, path)
    server.cards = [server.cards[0] | change]
    ask(server, path)
    assert len(server.bodies) == 24


def test_answers_that_are_there_are_taken_with_a_warning(servers, tmp_path):
    """No server tells apart two models that it loaded from one folder."""
    lines = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    for _ in range(2):
        ask(servers[0], tmp_path / "a.jsonl", SUMS[:2])
    logger.remove(sink)
    (line,) = lines
    assert f"a.jsonl holds 2 answers of tiny at {servers[0].url} already" in line
    assert "if another model answers there now, remove the file" in line
