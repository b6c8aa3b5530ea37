"""What config.json says about quantization, and weights in int32 words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.quantization_config import (
    WeightScheme,
    check_symmetric,
    check_unambiguous,
    quantized_weight,
    stores_words,
    to_words,
    weight_schemes,
    words_weight,
)
from rac_modifier.errors import RacError

INT4 = {
    "weights": {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 128,
        "symmetric": True,
    }
}
W8A8 = {
    "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "int", "strategy": "token"},
    "format": "int-quantized",
}


def quantization(*groups: dict, format: str = "pack-quantized") -> dict:
    return {
        "format": format,
        "config_groups": {f"group_{n}": group for n, group in enumerate(groups)},
    }


@pytest.mark.parametrize(
    "value", [None, [], "x", {}, {"config_groups": None}, {"config_groups": {}}]
)
def test_no_quantization(value: object) -> None:
    assert weight_schemes(value) == ()


def test_schemes_in_their_order_each_once() -> None:
    activations_only = {"input_activations": {"num_bits": 8}, "weights": None}
    assert weight_schemes(quantization(INT4, W8A8, INT4, activations_only)) == (
        WeightScheme("int", 4, "group", 128, True, "pack-quantized", None),
        WeightScheme("int", 8, "channel", None, True, "int-quantized", "int8 per token"),
    )


def test_defaults_of_a_group() -> None:
    (plain,) = weight_schemes(quantization({"weights": {"num_bits": 8}}))
    assert (plain.kind, plain.strategy, plain.symmetric) == ("int", "tensor", True)
    (grouped,) = weight_schemes(quantization({"weights": {"num_bits": 4, "group_size": 32}}))
    assert (grouped.strategy, grouped.group_size) == ("group", 32)


@pytest.mark.parametrize(
    "groups", [{"g": {"weights": {"type": "int"}}}, {"g": {"weights": 4}}, {"g": None}, ["W4A16"]]
)
def test_malformed_groups(groups: object) -> None:
    with pytest.raises(
        RacError, match=r"^config\.json: the config_groups of quantization_config are malformed"
    ):
        weight_schemes({"config_groups": groups})


@pytest.mark.parametrize(
    "change", [{"num_bits": 1e30}, {"num_bits": "4"}, {"group_size": 2**62}, {"group_size": [1]}]
)
def test_numbers_that_cannot_be(change: dict) -> None:
    with pytest.raises(RacError, match="are malformed"):
        weight_schemes(quantization({"weights": {**INT4["weights"], **change}}))


def test_patterns_that_match_without_end() -> None:
    """vLLM and transformers would match them against each module."""
    with pytest.raises(RacError, match=r"targets of config group 'group_0': .*too long to match"):
        weight_schemes(quantization({**INT4, "targets": ["re:(a+)+$"]}))
    with pytest.raises(RacError, match=r"ignore of quantization_config: .*too long to match"):
        weight_schemes({**quantization(INT4), "ignore": ["re:(a|a)*$"]})


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (
            WeightScheme("int", 4, "group", 128, True, "pack-quantized", None),
            "int4 in groups of 128 (pack-quantized)",
        ),
        (
            WeightScheme("float", 8, "channel", None, False, "float-quantized", "float8 per token"),
            "float8 one scale per channel, asymmetric (float-quantized), activations float8 per token",
        ),
    ],
)
def test_described(scheme: WeightScheme, text: str) -> None:
    assert scheme.describe() == text


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_words_and_back(bits: int, columns: int) -> None:
    weight = torch.randint(-8, 8, (3, columns), generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )
    words = to_words(weight, bits)
    assert words.keys() == {"weight_packed", "weight_shape"}
    assert words["weight_shape"].tolist() == [3, columns]
    schemes = weight_schemes(quantization({"weights": {"num_bits": bits}}))
    found, found_bits = quantized_weight(words, "a", schemes)
    assert (torch.equal(found, weight), found_bits) == (True, bits)


def test_without_schemes_the_width_follows_from_the_number_of_words() -> None:
    weight = torch.zeros(2, 32, dtype=torch.int8)
    assert quantized_weight(to_words(weight, 4), "a")[1] == 4
    assert quantized_weight(to_words(weight, 8), "a")[1] == 8
    with pytest.raises(
        RacError, match=r"^a\.weight_packed: 1 int32 words per row do not hold 3 values"
    ):  # one word for both widths
        quantized_weight(to_words(torch.zeros(2, 3, dtype=torch.int8), 4), "a")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"weight_shape": torch.tensor([3, 8])},
            r"a\.weight_packed: \[2, 1\] does not fit weight_shape \[3, 8\]",
        ),
        (
            {"weight_shape": torch.tensor([2, 800])},
            "1 int32 words per row do not hold 800 values of 4 or 8 bits",
        ),
        ({"weight_packed": torch.zeros(2, dtype=torch.int32)}, r"\[2\] does not fit"),
        ({"weight_shape": torch.tensor([2])}, "is not the shape of a matrix"),
    ],
)
def test_parts_that_contradict_each_other(parts: dict, message: str) -> None:
    good = to_words(torch.zeros(2, 8, dtype=torch.int8), 4)
    with pytest.raises(RacError, match=message):
        quantized_weight({**good, **parts}, "a")


@pytest.mark.parametrize("part", ["weight_zero_point", "weight_g_idx", "weight_global_scale"])
def test_an_asymmetric_module_is_refused(part: str) -> None:
    check_symmetric({"a.weight": 0, f"b.{part}": 0}, "a")
    with pytest.raises(RacError, match=rf"^b: has a {part}, .* or set storage: dense"):
        check_symmetric({f"b.{part}": 0}, "b")


def test_int8_in_words_beside_plain_int8_is_refused() -> None:
    words = {"weights": {"num_bits": 8}}
    check_unambiguous(weight_schemes(quantization(words)))
    check_unambiguous(weight_schemes(quantization(INT4, W8A8)))
    with pytest.raises(
        RacError, match="int-quantized and pack-quantized cannot be stored sparse in one checkpoint"
    ):
        check_unambiguous(weight_schemes(quantization(words, W8A8)))


def test_which_weights_upstream_stores_in_words() -> None:
    schemes = weight_schemes(quantization(INT4, W8A8))
    assert stores_words(4, schemes)
    assert not stores_words(8, schemes)
    assert not stores_words(
        8, weight_schemes(quantization({"weights": {"num_bits": 8, "type": "float"}}))
    )


def test_words_of_a_file(tmp_path: Path) -> None:
    weight = torch.arange(-8, 8, dtype=torch.int8).view(2, 8)
    tensors = {f"a.{part}": tensor for part, tensor in to_words(weight, 4).items()}
    tensors |= {
        "b.weight_packed": torch.zeros(2, 5),
        "b.weight_shape": torch.tensor([2, 8]),
        "c.weight_packed": torch.zeros(1),
    }
    tensors |= {
        "d.weight_packed": torch.zeros(2, 5, dtype=torch.int32),
        "d.weight_shape": torch.tensor([2, 8]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with TensorFiles(tmp_path) as files:
        found = words_weight(files, "a", ())
        assert found is not None
        assert (torch.equal(found[0], weight), found[1]) == (True, 4)
        assert [words_weight(files, name, ()) for name in "bcde"] == [None] * 4
