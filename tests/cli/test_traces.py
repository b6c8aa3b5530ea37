import json
from collections import Counter

from rac_modifier.traces.store import TraceStore
from tests.sampling import fake_vllm


def test_traces_collect_and_inspect(rac, tiny_folder, recipe_file, tmp_path):
    store = tmp_path / "new.jsonl"
    options = ("-r", recipe_file, "-s", f"traces.store={store}", "-s", "calibration.tokens=300")
    stdout = rac.output("traces", "collect", tiny_folder, *options, "--json")
    held = TraceStore.read(store)
    assert held.counts.tokens >= 300
    (part,) = json.loads(stdout)["parts"].values()
    figures = (part["store"], part["traces"], part["tokens"])
    assert figures == (str(store), len(held), held.counts.tokens)
    inspect = ("traces", "inspect", store, "--model", tiny_folder)
    checked = (*inspect, "--select", "{finished: true}")
    stdout = rac.output(*checked, "--samples", 0)
    assert f"selection   kept {held.counts.finished} of {len(held)}" in stdout
    figures = json.loads(rac(*checked, "--json", "--samples", 2)[1])
    assert figures["counts"]["traces"] == len(held)
    assert figures["selected"] == held.counts.finished
    assert figures["endings"]["ended_by"] == Counter(trace.finish_reason for trace in held)
    assert [sample["id"] for sample in figures["samples"]] == [trace.id for trace in held][:2]

    recovers = ("-s", "recover.tokens=400", "-s", "recover.held_out_tokens=200")
    assert rac("traces", "collect", tiny_folder, *options, *recovers)[0] == 0
    longer = TraceStore.read(store)
    assert longer.counts.tokens >= 300 + 400 + 200
    completions = [[trace.completion_ids for trace in traces] for traces in (held, longer)]
    assert completions[1][: len(held)] == completions[0]

    out = tmp_path / "new.parquet"
    held = longer
    stdout = rac("traces", "export", store, out, "--text", "--model", tiny_folder)[1]
    assert f"{out}: {len(held)} rows" in stdout

    stdout = rac.output(*inspect, "--samples", 2)
    assert f"{held.counts.prompt_tokens} prompt" in stdout
    assert tiny_folder.name in stdout
    assert str(tiny_folder) not in stdout
    assert stdout.count("\n--- ") == 2
    assert next(iter(held)).question.replace(" ", "") in stdout.replace(" ", "")


def test_collect_says_what_traces_are_for(rac, tiny_folder, recipe_file):
    """Calibration gets what is neither held out, nor recovery's, nor left out by the selection."""
    collect = ("traces", "collect", tiny_folder, "-r", recipe_file, "-s", "traces.store=new.jsonl")
    assert rac.output(*collect, "-s", "calibration.tokens=100").count("\n") == 1
    rest = ("calibration.held_out_tokens=100", "recover.tokens=400", "recover.held_out_tokens=200")
    rest = [word for setting in rest for word in ("-s", setting)]
    chosen = ("-s", "traces.select.finished=true")
    for settings in ((), chosen):
        words = (*collect, "-s", "calibration.tokens=60", *rest, *settings)
        part = json.loads(rac.output(*words, "--json"))["parts"]["traces"]
        names = ("selected", "not_selected", "held_out", "for_recovery")
        assert part["traces"] == sum(part[name] for name in names)
        assert part["held_out"] >= 4
        assert part["for_recovery"] > 4
        used = f"{part['selected']} for calibration ({part['usable_tokens']:,} tokens)"
        others = f"{part['held_out']} held out, {part['for_recovery']} for recovery"
        others += f", {part['not_selected']} not selected" if settings else ""
        assert rac.output(*words).splitlines()[1:] == [f"traces: {used}, {others}"]


def test_traces_inspect_without_the_model(rac, trace_store, tiny_folder, tmp_path):
    from rac_modifier.traces.records import encode

    held = TraceStore.read(trace_store)
    moved = tmp_path / "moved.jsonl"
    header = held.header.model_copy(update={"model": str(tmp_path / "gone")})
    moved.write_bytes(encode("header", header) + b"".join(encode("trace", t) for t in held))
    code, stdout, stderr = rac("traces", "inspect", moved)
    assert (code, "--model" in stderr) == (1, True)
    assert "traces " in stdout  # what needs no tokenizer is said all the same
    assert rac("traces", "inspect", moved, "--samples", 0)[0] == 0
    assert rac("traces", "inspect", moved, "--model", tiny_folder)[0] == 0


def test_traces_of_a_server_of_our_own_are_kept_and_compared_with_the_model(
    rac, tiny_folder, recipe_file, tmp_path, vllm
):
    options = ("-r", recipe_file, "-s", "traces.store=new.jsonl", "-s", "calibration.tokens=120")
    serve = ("--serve", "--concurrency", 3, "--precision", "float32")
    served = ("traces", "collect", tiny_folder, *options, *serve)
    rac.output(*served)
    assert len(fake_vllm.starts(tmp_path)) == 1
    assert fake_vllm.left_over(tmp_path) == []
    store = TraceStore.read(tmp_path / "new.jsonl")
    assert store.header.engine.kind == "openai"
    before = (tmp_path / "new.jsonl").read_bytes()
    out = rac.output(*served)
    assert out.startswith(f"new.jsonl: {len(store)} traces")
    assert (tmp_path / "new.jsonl").read_bytes() == before
    code, _, error = rac("traces", "collect", tiny_folder, *options)
    assert code == 1
    assert "holds another model" in error, "the tokens of the fake server are not this model's"
