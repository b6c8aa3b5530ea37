"""The estimate against the same sums written out, and that it grows with what costs time."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rac_modifier.frontier.compressing import Group
from rac_modifier.frontier.estimate import Asked, ModelShape, Plan, Speed, describe, estimate

SHAPE = ModelShape(parameters=1000, groups=(Group(10, (20,)),), layers=3, hidden=10, kv_bytes=40)
SERVED = Asked("served", answers=8, cap=100, at_once=4, served=True)
HERE = Asked("here", answers=6, cap=50, at_once=4, served=False)
PLAN = Plan(SHAPE, rows=2, tokens=500, traces=SERVED, asked=(SERVED, HERE), served=True)
SPEED = Speed(copied=1e5, computed=1e6, computed32=2e5)


def seconds(plan=PLAN, speed=SPEED):
    return {step.name: (step.seconds, step.most) for step in estimate(plan, speed)}


def test_answers_of_a_server_read_the_weights_once_per_token_of_all():
    def expected(length):  # 4 at once, 2 rounds of them; memory is slower than arithmetic here
        read = (2 * 1000 + 4 * (length / 2) * 40) / 1e5
        assert read > 2 * 1000 * 4 / 1e6
        return 2 * length * read / 0.4

    found = seconds()
    assert found["traces"] == pytest.approx((expected(30), expected(100)))
    assert found["served, 3 models"] == pytest.approx((3 * expected(30), 3 * expected(100)))
    assert found["starts of vllm serve"] == (3 * 90, 3 * 90)


def test_a_slow_processor_decides_where_it_is_slower_than_the_memory():
    slow = replace(SPEED, computed=1e4)
    assert seconds(speed=slow)["traces"][1] == pytest.approx(2 * 100 * (2 * 1000 * 4 / 1e4) / 0.4)


def test_a_batch_in_this_process_goes_on_to_its_longest_answer_and_launches_each_layer():
    def step(length):
        return (2 * 1000 + 4 * (length / 2) * 40) / 1e5 / 0.4 + 3 * 1e-3

    rounds = 6 / 4
    assert seconds()["here, 3 models"] == pytest.approx(
        (3 * rounds * 50 * step(15), 3 * rounds * 50 * step(50))
    )


def test_compressing():
    passes = 2 * 2 * 1000 * 500 / 1e6
    hessian = 2 * 500 * 10 * 10 / 2e5
    cross = (2 * 500 * 10 * 10 + 2 * 10 * 10 * 20) / 1e6
    factors = 2 * 10**3 * (1 / 6 + 3 / 2) / 2e5  # of the damped Hessian, and three inverses
    products = (12 + 2 + 10 + 2) * 2 * 10 * 10 * 20 / 1e6
    expected = 2 * (passes + hessian + cross + factors + products) / 0.4
    assert seconds()["compress, 2 rows"] == pytest.approx((expected, expected))


def test_training_is_counted_where_rows_train():
    assert not {"recover", "AutoRound"} & seconds().keys()
    found = seconds(replace(PLAN, recovered=300, autorounded=7000))
    assert found["recover"] == pytest.approx(2 * (8 * 1000 * 300 / 1e6 / 0.4,))
    assert found["AutoRound"] == pytest.approx(2 * (6 * 200 * 7000 / 1e6 / 0.4,))
    assert {name: found[name] for name in seconds()} == seconds()
    slow = replace(
        SPEED, computed=1e4
    )  # bfloat16 is slower than float32 there, so that float32 is taken
    assert seconds(replace(PLAN, recovered=300), slow)["recover"][0] == pytest.approx(
        8 * 1000 * 300 / 2e5 / 0.4
    )


def test_a_mixture_of_experts_reads_all_weights_and_computes_with_some():
    few = replace(PLAN, shape=replace(SHAPE, active=100))
    assert (
        seconds(few, replace(SPEED, computed=1e4))["served, 3 models"][1]
        < seconds(speed=replace(SPEED, computed=1e4))["served, 3 models"][1]
    )
    assert seconds(few)["served, 3 models"] == seconds()["served, 3 models"]
    passes = 2 * 2 * 900 * 500 / 1e6
    fewer = seconds()["compress, 2 rows"][0] - seconds(few)["compress, 2 rows"][0]
    assert fewer == pytest.approx(2 * passes / 0.4)


def test_without_a_server_nothing_is_started():
    assert "starts of vllm serve" not in seconds(replace(PLAN, served=False))


def test_the_text_says_that_it_is_estimated_and_how():
    text = describe(estimate(PLAN, SPEED))
    first, *_ = text.splitlines()
    assert first.startswith("Estimated, not measured: ")
    assert "if every answer is cut at its cap" in first
    assert "Formula: max((weights + answers x length x kv) / bandwidth" in text
    long = describe(estimate(replace(PLAN, rows=10_000), SPEED))
    assert " hours, or " in long.splitlines()[0]
    assert " minutes, or " in describe(estimate(replace(PLAN, rows=9), SPEED)).splitlines()[0]


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_of_a_model_without_weights(tied):
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, tie_word_embeddings=tied, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        shape = ModelShape.of(Qwen2ForCausalLM(config))
    linear = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    norms_and_biases = 2 * (2 * 32 + 32 + 2 * 16) + 32
    assert shape.parameters == linear + norms_and_biases + (1 if tied else 2) * 100 * 32
    assert sum(group.weights for group in shape.groups) == linear
    assert len(shape.groups) == 2 * 4
    assert (shape.layers, shape.hidden, shape.itemsize) == (2, 32, 2)
    assert shape.kv_bytes == 2 * 2 * 2 * 8 * 2
    assert shape.nbytes == 2 * shape.parameters


def test_the_speed_of_this_machine():
    speed = Speed.measured(torch.float32)
    assert 1e6 < speed.copied < 1e14
    assert min(speed.computed, speed.computed32) > 1e6
