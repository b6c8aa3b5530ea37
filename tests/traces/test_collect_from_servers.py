"""Collecting from servers that fail: every finished trace once, none invented, the same set as without faults."""

import random
import threading

import pytest
from transformers import AutoModelForCausalLM

from rac_modifier.calibration.calibration_set import build_calibration_set
from rac_modifier.calibration.trace_budget import collect_for_calibration
from rac_modifier.errors import RacError
from rac_modifier.problems.source import load_problems
from rac_modifier.sampling import load_balancer as servers
from rac_modifier.sampling.completions_api import trace_seed
from rac_modifier.sampling.generate import generate
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.sampling.prompts import render_prompt
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.failures import failures_path, read_failures
from rac_modifier.traces.fill_store import pending_path
from rac_modifier.traces.store import TraceStore
from tests.sampling.fake_server import NAME, FakeServer, rule
from tests.tiny import tiny_model, tiny_tokenizer

SAMPLING = SamplingSettings(temperature=1.0, max_new_tokens=20)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def subject():
    return ModelIdentity.of_model(tiny_model())


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(servers, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(servers, "LONGEST_PAUSE", 0.05)


@pytest.fixture
def server():
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def collect(server, subject, tokenizer, tmp_path):
    def collect(name="s.jsonl", *, of=subject, urls=None, tokens=3000, problems=None, retry_failed=False, **engine):
        settings = {"concurrency": 8, "verify_model": False, "timeout": 5, **engine}
        return collect_traces(
            of,
            tokenizer,
            tmp_path / name,
            problems=problems or ProblemSource(),
            sampling=SAMPLING,
            tokens=tokens,
            engine=EngineSettings(base_urls=urls or (server.url,), **settings),
            retry_failed=retry_failed,
            progress=False,
        )

    return collect


def is_exact(store, tokenizer):
    """Each trace is what the server's rule gives for its prompt and seed, in the order of the problems."""
    problems = load_problems(ProblemSource(), 0)
    for trace in store:
        problem = next(p for p in problems if p.id == trace.problem_id)
        prompt = render_prompt(tokenizer, problem.question)
        seed = trace_seed(0, f"{problem.id}#0")
        assert list(trace.prompt_ids) == prompt
        assert list(trace.completion_ids) == rule({"seed": seed, "prompt": prompt, "max_tokens": 20})
        assert trace.finish_reason == ("stop" if trace.completion_ids[-1] == 1 else "length")
    return True


def test_the_store_holds_what_the_server_generated(collect, server, tokenizer, tmp_path):
    store = collect()
    last = list(store)[-1]
    assert store.counts.tokens >= 3000 > store.counts.tokens - last.tokens
    assert is_exact(store, tokenizer)
    assert 0 < store.counts.finished < len(store)
    assert (store.header.engine.kind, store.header.engine.served_model) == ("openai", NAME)
    body = server.bodies[0]
    assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (1.0, 0.95, -1, 1.0)
    assert body["return_token_ids"] is True
    assert 1 < server.most_at_once <= 8


def test_the_order_of_finishing_does_not_matter(collect, server):
    quiet = collect("a.jsonl", concurrency=1, tokens=1500)
    rng = random.Random(0)
    server.delay = lambda body: rng.choice([0, 0, 0, 0.03])
    assert collect("b.jsonl", concurrency=16, tokens=1500).sha256() == quiet.sha256()


def test_twenty_faults_leave_the_same_file(collect, server, tokenizer):
    quiet = collect("a.jsonl")
    kinds = ["hang", "500", "429", "reset", "truncate", "garbage", "503", "short", "miscount", "500"] * 2
    first = len(server.bodies)
    server.fault = lambda number, body: (
        kinds[(number - first) // 3] if (number - first) % 3 == 1 and number - first < 60 else None
    )
    noisy = collect("b.jsonl", timeout=0.5)
    assert server.faults.total() == 20
    assert noisy.sha256() == quiet.sha256()
    assert is_exact(noisy, tokenizer)
    assert read_failures(noisy.path) == []


def test_what_finished_early_is_kept_for_a_larger_budget(collect, server, tmp_path):
    """The first problem hangs and the run is ended: the others, finished behind it, are not asked for again."""
    first = next(load_problems(ProblemSource(), 0))
    blocked = trace_seed(0, f"{first.id}#0")
    server.fault = lambda number, body: (
        "401" if body["seed"] == blocked and len(server.bodies) > 20 else ("500" if body["seed"] == blocked else None)
    )
    with pytest.raises(RacError, match="api_key_env"):
        collect(tries=1000)
    pending = TraceStore.read(pending_path(tmp_path / "s.jsonl"))
    assert len(pending) >= 8
    assert len(TraceStore.read(tmp_path / "s.jsonl")) == 0
    asked = {b["seed"] for b in server.bodies}
    server.fault = lambda number, body: None
    before = len(server.bodies)
    store = collect()
    done = {trace_seed(0, t) for t in pending.ids()}
    assert not done & {b["seed"] for b in server.bodies[before:]}
    assert done < asked
    assert store.sha256() == collect("b.jsonl").sha256()


def test_a_store_that_holds_enough_asks_nobody(collect, server):
    before = collect()
    server.close()
    assert collect(tokens=2000).sha256() == before.sha256()


def test_a_budget_raised_goes_on(collect):
    collect("a.jsonl", tokens=1000)
    assert collect("a.jsonl").sha256() == collect("b.jsonl").sha256()


def test_two_servers_share_the_work_and_one_may_die(collect, server, tokenizer):
    other = FakeServer()
    quiet = collect("a.jsonl")
    server.bodies.clear()
    other.delay = server.delay = lambda body: 0.005
    killer = threading.Timer(0.1, other.close)

    def die(number, body):
        return "reset" if number > 10 else None

    other.fault = die
    try:
        both = collect("b.jsonl", urls=(server.url, other.url))
    finally:
        killer.cancel()
        other.close()
    assert both.sha256() == quiet.sha256()
    assert len(other.bodies) > 5
    assert len(server.bodies) > 5


def test_a_problem_that_fails_goes_to_the_side_file_and_is_tried_again_on_request(collect, server):
    quiet = collect("a.jsonl")
    third = list(quiet)[2]
    server.fault = lambda number, body: "400" if body["seed"] == trace_seed(0, third.id) else None
    store = collect("b.jsonl")
    assert third.id not in store
    (failed,) = read_failures(store.path)
    assert failed.id == third.id
    assert "told to answer 400" in failed.reason
    assert list(store)[:-1] == [t for t in quiet if t.id != third.id][: len(store) - 1]

    server.fault = lambda number, body: None
    before = len(server.bodies)
    assert third.id not in collect("b.jsonl")
    assert len(server.bodies) == before
    again = collect("b.jsonl", retry_failed=True)
    assert set(quiet) <= set(again)
    assert not failures_path(store.path).exists()


def test_an_outage_ends_the_run_and_marks_no_problem(collect, server, tmp_path):
    quiet = collect("a.jsonl")
    server.fault = lambda number, body: "500" if number > len(quiet) + 30 else None
    with pytest.raises(RacError, match=r"in a row failed.*told to answer 500.*tried 2 times.*run again"):
        collect("b.jsonl", tries=2)
    assert read_failures(tmp_path / "b.jsonl") == []
    server.fault = lambda number, body: None
    assert collect("b.jsonl").sha256() == quiet.sha256()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no_ids", "return_token_ids"),
        ("other_prompt", "read another prompt"),
        ("no_eos", "which is no EOS"),
        ("past_eos", "ignore_eos"),
        ("401", "api_key_env"),
        ("404", "engine.model"),
    ],
)
def test_a_server_that_cannot_do_it_ends_the_run(collect, server, fault, words):
    server.fault = lambda number, body: fault
    with pytest.raises(RacError, match=words):
        collect()


@pytest.mark.parametrize(
    ("cards", "engine", "words"),
    [
        ([{"id": "other"}], {"model": "tiny"}, "does not serve 'tiny', but 'other'"),
        ([{"id": "a"}, {"id": "b"}], {}, "serves 'a', 'b'; say with engine.model"),
        ([{"id": "a", "parent": "b"}], {"model": "a"}, "adapter"),
        ([{"id": "a", "max_model_len": 20}], {}, "--max-model-len"),
    ],
)
def test_another_model_is_refused_by_its_entry(collect, server, tmp_path, cards, engine, words):
    server.cards = cards
    with pytest.raises(RacError, match=words):
        collect(**engine)
    assert not (tmp_path / "s.jsonl").exists()


def test_no_server_there(collect):
    with pytest.raises(RacError, match=r"no server answers at http://127\.0\.0\.1:9/v1"):
        collect(urls=("http://127.0.0.1:9",))


def greedy(model, tokenizer):
    """What a server that holds this model answers."""

    def answer(body):
        if body["temperature"] > 0:
            return rule(body)
        settings = SamplingSettings(temperature=0, max_new_tokens=body["max_tokens"])
        return list(generate(model, tokenizer, [body["prompt"]], settings, [""])[0].ids)

    return answer


def test_greedy_tokens_tell_another_model(collect, server, tokenizer):
    model = tiny_model()
    server.answer = greedy(model, tokenizer)
    assert len(collect("a.jsonl", of=model, verify_model=True, tokens=200).header.engine.probes) == 4
    server.answer = greedy(tiny_model(seed=1), tokenizer)
    with pytest.raises(RacError, match=r"holds another model than .*verify_model: false"):
        collect("b.jsonl", of=model, verify_model=True, tokens=200)
    collect("b.jsonl", of=model, tokens=200)


def test_a_store_collected_without_the_weights_is_checked_once_they_are_there(collect, server, tokenizer):
    server.answer = greedy(tiny_model(seed=1), tokenizer)
    collect(verify_model=True, tokens=200)
    with pytest.raises(RacError, match=r"the server that filled trace store .*s\.jsonl.* another model"):
        collect(of=tiny_model(), verify_model=True, tokens=200)


def test_two_kinds_of_engines_do_not_fill_one_store(collect, tokenizer, tmp_path):
    collect(tokens=300)
    model = tiny_model()

    def in_process(tokens):
        return collect_traces(
            model,
            tokenizer,
            tmp_path / "s.jsonl",
            problems=ProblemSource(),
            sampling=SAMPLING,
            tokens=tokens,
            progress=False,
        )

    assert in_process(300).counts.tokens >= 300
    with pytest.raises(RacError, match=r"another engine \(openai, not transformers\).*traces.engine"):
        in_process(5000)


def test_weights_that_are_not_there_need_a_server(subject, tokenizer, tmp_path):
    with pytest.raises(RacError, match="not in memory"):
        collect_traces(
            subject, tokenizer, tmp_path / "s", problems=ProblemSource(), sampling=SAMPLING, tokens=9, progress=False
        )


def test_a_key_is_sent_only_if_named(collect, server, monkeypatch):
    with pytest.raises(RacError, match="'RAC_TEST_KEY', which is not set"):
        collect(api_key_env="RAC_TEST_KEY")
    monkeypatch.setenv("RAC_TEST_KEY", "k")
    collect(api_key_env="RAC_TEST_KEY", tokens=100)
    assert {h["Authorization"] for h in server.headers} == {"Bearer k"}


def test_pruning_finds_what_was_collected_without_the_weights(server, tiny_folder, tokenizer, tmp_path, monkeypatch):
    """As `rac traces collect` and `rac prune` with one recipe: the same store by default, and no server in the end."""
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    server.answer = greedy(model, tokenizer)
    engine = {"base_urls": [server.url], "concurrency": 4}
    settings = TraceSettings(sampling={"temperature": 1.0, "max_new_tokens": 20}, engine=engine)
    budget = CalibrationSettings(tokens=400, max_sequence_tokens=40, held_out_tokens=0)
    subject = ModelIdentity.of_files(str(tiny_folder))
    collected = collect_for_calibration(subject, tokenizer, settings, budget, progress=False)["traces"].store
    server.close()
    found = build_calibration_set(model, tokenizer, settings, budget, progress=False)
    assert found.pools["traces"].store.path == collected.path
    assert found.as_dict()["trace_stores"]["traces"]["sha256"] == collected.sha256()
    assert found.loader.composition.tokens == 400
    in_process = settings.model_copy(update={"engine": None})
    again = build_calibration_set(model, tokenizer, in_process, budget, progress=False)
    assert again.pools["traces"].store.path == collected.path
