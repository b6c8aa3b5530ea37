"""Models that do not belong together are told apart by their weights; the commands are in tests/cli/test_recover_refused.py."""

from __future__ import annotations

import pytest

from rac_modifier.errors import RacError
from rac_modifier.recovery.check_pair import check_dense, check_made_from
from tests import tiny


@pytest.mark.parametrize("part", ["model.embed_tokens", "lm_head"])
def test_another_embedding_or_head_is_another_model(part):
    dense, other = tiny.tiny_model(), tiny.tiny_model()
    check_made_from(other, dense)
    other.get_submodule(part).weight.data[3, 3] += 1
    with pytest.raises(RacError, match="their embeddings or heads differ"):
        check_made_from(other, dense)


def test_another_architecture_is_another_model():
    """The same embeddings and head, in a model of another class."""
    dense, other = tiny.tiny_model(), tiny.tiny_model()
    other.__class__ = type("Other", (type(dense),), {})
    with pytest.raises(
        RacError, match="the Other to recover was not made from this Qwen3ForCausalLM"
    ):
        check_made_from(other, dense)


@pytest.mark.parametrize(("sparse_layers", "refused"), [(0, False), (7, False), (8, True)])
def test_a_teacher_is_sparse_where_most_of_its_layers_are(sparse_layers, refused):
    model = tiny.tiny_model()
    layers = list(tiny.linears(model).values())
    assert len(layers) == 14, "and the head: half of them lies between 7 and 8"
    for linear in layers[:sparse_layers]:
        linear.weight.data[:, ::2] = 0
    if refused:
        with pytest.raises(RacError, match=r"sparse \(8 of its 15 linear layers\)"):
            check_dense(model, "teacher")
    else:
        check_dense(model, "teacher")
