"""The traces of `rac recover`; tests/cli/test_recover.py has whole runs."""

from transformers import AutoModelForCausalLM

from rac_modifier.recovery.checkpoint import collect_unused
from rac_modifier.settings.calibration import TraceSettings
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.traces import records
from tests import tiny


def tokens_once(traces):
    return sum(trace.without_repeats().tokens for trace in traces)


def test_as_many_tokens_are_collected_as_are_left_without_repeated_tails(
    tiny_folder, tmp_path, monkeypatch
):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), tiny.tiny_tokenizer()
    monkeypatch.setattr(
        records, "repeated_tail", lambda ids, finish_reason: 6 * (finish_reason == "length")
    )  # of each completion that was cut at 12 tokens
    sampling = SamplingSettings(max_new_tokens=12, batch_size=4, temperature=1.0)
    settings = TraceSettings(store=str(tmp_path / "store.jsonl"), sampling=sampling)
    asked = (model, tokenizer, settings, 300)
    store, fresh = collect_unused(*asked, set())
    assert store.counts.tokens > 300 + 6
    assert tokens_once(fresh) >= 300
    whole = store.counts.tokens
    more, others = collect_unused(*asked, {store.sha256()})
    assert more.counts.tokens >= whole + 300
    assert tokens_once(others) >= 300
    assert not {trace.id for trace in fresh} & {trace.id for trace in others}
