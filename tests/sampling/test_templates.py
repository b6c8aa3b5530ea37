"""Traces under a template that treats thinking as Qwen3's does: the store holds the ids that the server generated."""

from __future__ import annotations

import random

from tokenizers import AddedToken

from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.sampling.prompts import render_question
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.store import TraceStore
from tests.sampling.fake_server import FakeServer
from tests.tiny import byte_tokenizer, tiny_model

# Thinking of turns before the last question is deleted; a switch closes the thinking before it begins.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen3_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = QWEN3
    return tokenizer


class Writer:
    """Generates thinking, a tag, an answer and an EOS out of random tokens, and remembers it all."""

    def __init__(self, tokenizer, eos):
        self.tokenizer, self.eos = tokenizer, eos
        self.open, self.close = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        self.ordinary = sorted(
            set(range(len(tokenizer))) - {*tokenizer.all_special_ids, *eos, self.open, self.close}
        )
        self.written = {}

    def __call__(self, body):
        rng = random.Random(f"{body['seed']}/{body['prompt']}")
        thinking = [self.open, *rng.choices(self.ordinary, k=rng.randint(5, 40)), self.close]
        ids = [*thinking, *rng.choices(self.ordinary, k=5), rng.choice(self.eos)]
        if rng.random() < 0.1:  # an answer that never comes
            ids = rng.choices(self.ordinary, k=body["max_tokens"])
        self.written[tuple(body["prompt"]), body["seed"]] = tuple(ids)
        return ids


def test_the_store_holds_the_ids_that_the_server_generated(tmp_path):
    count, tokenizer = 100, qwen3_tokenizer()
    eos = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    model = tiny_model(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1
    )
    model.generation_config.eos_token_id = eos
    server, writer = FakeServer(), Writer(tokenizer, eos)
    server.answer, server.eos = writer, set(eos)
    try:
        collect_traces(
            ModelIdentity.of_model(model),
            tokenizer,
            tmp_path / "s.jsonl",
            problems=ProblemSource(),
            sampling=SamplingSettings(temperature=1.0, max_new_tokens=60),
            tokens=count * 80,
            engine=EngineSettings(base_urls=(server.url,), concurrency=16, verify_model=False),
            progress=False,
        )
    finally:
        server.close()
    traces = list(TraceStore.read(tmp_path / "s.jsonl"))
    assert len(traces) >= count
    written = {}
    for (prompt, _), ids in writer.written.items():
        written.setdefault(prompt, set()).add(ids)
    assert all(trace.completion_ids in written[trace.prompt_ids] for trace in traces)
    finished = [trace for trace in traces if trace.finish_reason == "stop"]
    assert 0 < len(finished) < len(traces)
    assert {trace.completion_ids[-1] for trace in finished} == set(eos)
    assert all(trace.completion_ids.count(writer.close) == 1 for trace in finished)
    # Text would not have kept them: special tokens are lost, and most of the rest is cut into other tokens.
    back = tokenizer.batch_decode(
        [list(t.completion_ids) for t in finished], skip_special_tokens=True
    )
    again = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in back]
    assert not any(ids == trace.completion_ids for ids, trace in zip(again, finished, strict=True))


def test_the_template_asks_and_would_delete_the_thinking_of_finished_turns():
    tokenizer = qwen3_tokenizer()
    prompt = render_question(tokenizer, "2+2?", SamplingSettings())
    text = tokenizer.decode(prompt)
    assert text.count("2+2?") == 1
    assert text.rstrip().endswith("assistant")
    turns = [("user", "2+2?"), ("assistant", "<think>\nfour\n</think>\n\n4"), ("user", "sure?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "four" not in rendered
    off = tokenizer.decode(render_question(tokenizer, "2+2?", SamplingSettings(thinking=False)))
    assert off == text + "<think>\n\n</think>\n\n"
