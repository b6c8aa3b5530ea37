import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from rac_modifier.errors import RacError
from rac_modifier.recovery.hidden_states import check_head, output_head, predicting_states
from tests.recovery.recovery_helpers import dense_and_sparse, sequences


def test_states_are_those_that_predict_completion_tokens_in_order():
    dense, _ = dense_and_sparse()
    data = sequences(3)
    with torch.no_grad():
        found = predicting_states(dense, data)
        expected = [
            dense.model(torch.tensor([ids])).last_hidden_state[0, prompt - 1 : -1]
            for ids, prompt in data
        ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_a_gradient_passes_through_them():
    dense, _ = dense_and_sparse()
    predicting_states(dense, sequences(2)).sum().backward()
    assert float(dense.model.layers[0].self_attn.q_proj.weight.grad.abs().sum()) > 0


def test_a_plain_head_is_accepted_and_a_capped_one_is_refused():
    dense, _ = dense_and_sparse()
    check_head(dense, sequences(1)[0])
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=3.0,
        initializer_range=0.4,
    )
    with pytest.raises(RacError, match="changes its logits after the output head"):
        check_head(Gemma2ForCausalLM(config).eval(), sequences(1)[0])


def test_a_model_without_a_plain_head_is_refused():
    dense, _ = dense_and_sparse()
    dense.set_output_embeddings(torch.nn.Linear(64, 300, bias=True))
    with pytest.raises(RacError, match="no plain linear output head"):
        output_head(dense)
