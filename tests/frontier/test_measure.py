"""A model measured next to its dense model, compared with plain loops; bytes against sums."""

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier.evaluation.results import Row
from rac_modifier.evaluation.stopping import Ending, Loop
from rac_modifier.frontier import measure as module
from rac_modifier.frontier.measure import (
    HeldOut,
    _pieces_of,
    _trace_of,
    checkpoint_bytes,
    measure,
    measure_dense,
)
from rac_modifier.measure.divergence import TokenDivergence
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import Generation, render_question
from rac_modifier.settings.sampling import SamplingSettings
from tests.tiny import byte_tokenizer, tiny_model, tiny_tokenizer

SAMPLING = SamplingSettings(temperature=0.0, top_k=0, max_new_tokens=12, batch_size=4)
PROBLEMS = [Problem(str(i), "what is this?"[: i + 3], "7", None) for i in range(5)]


@pytest.fixture(scope="module")
def models():
    dense, other = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.0 + 0.05 * torch.randn_like(parameter))
    return dense, other


@torch.no_grad()
def kl_along(dense, other, prompt, ids):
    both = torch.tensor([[*prompt, *ids]])
    p, q = (m(both).logits[0, len(prompt) - 1 : -1].double().softmax(-1) for m in (dense, other))
    return (p * (p / q).log()).sum(-1).tolist()


def test_divergence_is_measured_on_the_dense_answers_and_answers_are_graded(models):
    dense, other = models
    tokenizer, held_out = tiny_tokenizer(), HeldOut(PROBLEMS, SAMPLING)
    reference = measure_dense(dense, tokenizer, held_out)
    result = measure("other", other, dense, tokenizer, held_out, reference)
    values = []
    for problem, of_dense, own in zip(PROBLEMS, reference[1], result[1], strict=True):
        assert own["id"] == of_dense["id"] == problem.id
        prompt = render_question(tokenizer, problem.question, SAMPLING)
        kl = kl_along(dense, other, prompt, of_dense["ids"])
        assert own["kl"] == pytest.approx(kl, abs=1e-4)
        values += kl
    figures, traces = result
    assert figures["divergence"]["kl"] == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert figures["divergence"]["tokens"] == len(values)
    assert sum(values) > 0.01, "the models differ, so that this says something"
    assert reference[0]["divergence"] is reference[0]["paired"] is None
    assert figures["accuracy"]["label"] == "other"
    assert figures["accuracy"]["problems"] == figures["paired"]["problems"] == 5
    truncated = [trace["finish"] == "length" for trace in traces]
    assert figures["truncated"] == pytest.approx(sum(truncated) / 5)
    assert figures["thinking"] == figures["accuracy"]["mean_thinking_tokens"]
    kinds = [samples[0]["kind"] for samples in figures["accuracy"]["endings"].values()]
    assert kinds == [trace["kind"] for trace in traces]


def test_answers_say_whether_they_ended_and_without_a_reference_nothing_is_graded(monkeypatch):
    monkeypatch.setattr(module, "MOST_TRACES", 5)
    sampling = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=40, seed=1)
    problems = [Problem(str(i), f"{i}?", None, None) for i in range(12)]
    model, tokenizer = tiny_model(), tiny_tokenizer()
    result = measure_dense(model, tokenizer, HeldOut(problems, sampling))
    assert {trace["finish"] for trace in result[1]} == {"stop", "length"}
    for trace in result[1]:
        assert (trace["ids"][-1] == 1) == (trace["finish"] == "stop")
        assert len(trace["ids"]) == 40 or trace["finish"] == "stop"
        assert trace["correct"] is None
        assert trace["kind"] in ("finished", "looping", "going")
        assert (trace["kind"] == "finished") == (trace["finish"] == "stop")
    other, shown = measure("other", model, model, tokenizer, HeldOut(problems, sampling), result)
    assert [trace["id"] for trace in shown] == ["0", "1", "2", "3", "4"]
    assert other["accuracy"] is other["paired"] is None
    assert other["divergence"]["sequences"] == 12


PROBLEM = Problem("p", "1 + 1?", "2", None)


class DropsTheFirstSpace:
    """A decoder as sentencepiece's: the space of a first token is dropped."""

    words = ["▁a", "▁b", "c"]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")


def test_the_pieces_are_the_text_token_by_token():
    """A character of several tokens belongs to the last one; the last may be half of one."""
    tokenizer = byte_tokenizer()
    for text in ("", "abc", "naïve 漢字 🙂!", "🙂🙂"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        expected = [p for c in text for p in [""] * (len(c.encode()) - 1) + [c]]
        assert _pieces_of(tokenizer, ids) == expected
    assert "".join(_pieces_of(tokenizer, ids[:-1])) == "🙂\ufffd"
    assert _pieces_of(DropsTheFirstSpace(), [0, 1, 2, 1]) == ["a", " b", "c", " b"]


def test_where_two_answers_part_and_where_a_loop_begins():
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    dense = Generation((*tokenizer.encode("<think>ü1</think>2"), end), "stop")
    own = Generation(tuple(tokenizer.encode("<think>ü12222")), "length")
    ended = Row("p", None, True, Ending("right", 7, 5, True))
    looping = Row("p", None, False, Ending("looping", 7, 7, False, Loop(4, 1, "tokens")))
    of_dense = _trace_of(tokenizer, PROBLEM, dense, ended)
    assert of_dense["text"] == "<think>ü1</think>2<|end|>"
    assert of_dense["pieces"] == [7, 0, 1, 1, 8, 1, 7]
    assert (of_dense["kind"], of_dense["question"], of_dense["answer"]) == ("right", "1 + 1?", "2")
    kl = TokenDivergence([0.123456] * 7, [True] * 7)
    trace = _trace_of(tokenizer, PROBLEM, own, looping, dense, kl)
    assert (trace["same_tokens"], trace["same_characters"]) == (4, len("<think>ü1"))
    assert trace["kl"] == [0.1235] * 7
    assert (trace["finish"], trace["correct"], trace["kind"]) == ("length", False, "looping")
    assert trace["loop"] == len("<think>ü1")
    equal = _trace_of(tokenizer, PROBLEM, dense, ended, dense, kl)
    assert equal["same_tokens"] == len(dense.ids)
    assert equal["loop"] is None


def test_every_tensor_is_counted_once_and_by_what_it_holds(tmp_path):
    bf16 = torch.bfloat16
    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 4, dtype=bf16),  # 80
        "lm_head.weight": torch.zeros(10, 4, dtype=bf16),  # 80
        "model.norm.weight": torch.zeros(4, dtype=bf16),  # 8
        "model.layers.0.a.weight": torch.zeros(4, 8, dtype=bf16),  # 64, 32 weights
        "model.layers.0.a.bias": torch.zeros(4, dtype=bf16),  # 8
        "model.layers.0.b.compressed": torch.zeros(7, dtype=bf16),  # 14
        "model.layers.0.b.bitmask": torch.zeros(4, 1, dtype=torch.uint8),  # 4
        "model.layers.0.b.row_offsets": torch.zeros(5, dtype=torch.int32),  # 20
        "model.layers.0.b.shape": torch.tensor([4, 8]),  # 16, 32 weights
        "model.layers.0.c.weight_packed": torch.zeros(4, 1, dtype=torch.int32),  # 16
        "model.layers.0.c.weight_shape": torch.tensor([4, 8]),  # 16, 32 weights
        "model.layers.0.c.weight_scale": torch.zeros(4, 2, dtype=bf16),  # 16
        "model.layers.0.c.weight_zero_point": torch.zeros(1, 2, dtype=torch.int32),  # 8
        "model.layers.0.c.weight_g_idx": torch.zeros(8, dtype=torch.int32),  # 32
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert checkpoint_bytes(tmp_path) == {
        "matrices": 64 + 14 + 4 + 20 + 16 + 16 + 8 + 32,
        "total": sum(tensor.nbytes for tensor in tensors.values()),
        "bits_per_weight": pytest.approx(8 * 174 / 96),
    }
    save_file({"norm.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert checkpoint_bytes(tmp_path)["bits_per_weight"] == 0


@pytest.mark.parametrize(("group", "dtype"), [(16, torch.float8_e4m3fn), (32, torch.uint8)])
def test_nvfp4_and_mxfp4_have_two_weights_per_byte(tmp_path, group, dtype):
    """Their files have no `weight_shape`. 4 bits, a scale per group, and NVFP4's one float32."""
    tensors = {
        "model.layers.0.a.weight_packed": torch.zeros(8, 32, dtype=torch.uint8),
        "model.layers.0.a.weight_scale": torch.zeros(8, 64 // group).to(dtype),
    }
    if group == 16:
        tensors["model.layers.0.a.weight_global_scale"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    bits = checkpoint_bytes(tmp_path)["bits_per_weight"]
    assert bits == 4 + 8 / group + (32 / (8 * 64) if group == 16 else 0)
