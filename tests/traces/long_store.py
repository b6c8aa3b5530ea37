"""A store of 499 traces with answers, right and wrong, finished and cut."""

from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.traces.store import StoreHeader, Trace, TraceStore

HEADER = StoreHeader(
    fingerprint="f" * 64,
    model="tiny",
    tokenizer="t" * 64,
    chat_template="abc",
    sampling=SamplingSettings().resolved(None),
    problems=ProblemSource(),
)


def trace(tokenizer, i):
    text = "12 " * (i % 40) + f"</think>\\boxed{{{i if i % 4 else 'x'}}}"
    ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    end = "stop" if i % 3 else "length"
    return Trace(f"p{i}#0", f"p{i}", (3, 4), ids, end, 0, f"{i} é?", str(i))


def fill(path, tokenizer, count=500):
    """Return the store at `path`, with its traces."""
    with TraceStore.open_append(path, HEADER) as opened:
        opened.append_many([trace(tokenizer, i) for i in range(count) if i != 4])
    return TraceStore.read(path)
