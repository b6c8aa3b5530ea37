"""What is trained and in which dtype, recomputed layers, and shards of parameters and batches."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import offload_module
from safetensors.torch import load_file

from rac_modifier.distributed.processes import Processes
from rac_modifier.errors import RacError
from rac_modifier.recovery.fixed_mask import FixedMask
from rac_modifier.recovery.student import Student, in_float32, recomputing
from tests.recovery import sharded_run
from tests.recovery.recovery_helpers import dense_and_sparse, sequences
from tests.started import started_forks
from tests.tiny import tiny_gemma, tiny_model

IDS = torch.arange(5, 37).view(2, 16)
NAME = "model.layers.1.mlp.up_proj"


def test_all_but_embeddings_and_head_are_trained_in_float32_and_come_back():
    _, model = dense_and_sparse()
    model.to(torch.bfloat16)
    model.model.norm.weight.requires_grad_(False)
    linear = model.model.layers[0].mlp.up_proj
    linear.weight_scale = torch.nn.Parameter(torch.ones(128, 1), requires_grad=False)
    rotary = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with in_float32(model):
        for name, parameter in model.named_parameters():
            frozen = any(part in name for part in ("embed", "lm_head", "weight_scale"))
            assert parameter.requires_grad != frozen, name
            assert frozen or parameter.dtype == torch.float32, name
        model.model.norm.weight.grad = torch.ones(64)
    assert model.model.norm.weight.dtype == linear.weight.dtype == torch.bfloat16
    assert linear.weight.requires_grad
    assert not model.model.norm.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(buffer, rotary[name]) for name, buffer in model.named_buffers())
    tied = tiny_model(tie_word_embeddings=True)
    with in_float32(tied):
        assert not tied.get_input_embeddings().weight.requires_grad


def saved_bytes(model, enabled):
    """Bytes that autograd saves for the backward pass, the loss and the gradients."""
    sizes, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with recomputing(model, enabled), hooks:
        loss = model(input_ids=IDS, use_cache=False).logits.square().mean()
        size = sum(nbytes for pointer, nbytes in sizes.items() if pointer not in weights)
        loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return size, loss.detach(), gradients


def test_an_offloaded_layer_stays_offloaded_after_recomputing():
    model = tiny_model()
    layer = model.model.layers[0]
    offload_module(layer.mlp.up_proj, "cpu", "cpu")
    offload_module(layer, "cpu", "cpu")
    before = layer.forward
    with recomputing(model):
        assert layer.forward is not before
    assert layer.forward is before
    assert "forward" not in vars(model.model.layers[1])


def test_recomputing_gives_the_same_loss_and_gradients_and_saves_less():
    model = tiny_model(num_hidden_layers=4)
    (plain, *results), (less, *again) = (saved_bytes(model, enabled) for enabled in (False, True))
    assert less < 0.6 * plain
    torch.testing.assert_close(results, again, rtol=0, atol=0)


def test_a_model_whose_layers_are_unknown_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model[0].weight.data[:, ::2] = 0.0
    says = r"Sequential has no layers .* leave recover\.activation_checkpointing out"
    with pytest.raises(RacError, match=says), recomputing(model):
        pass
    args = dict(model.named_parameters()), FixedMask(model), Processes(0, 2, torch.device("cpu"))
    with pytest.raises(RacError, match=r"Sequential has no layers .* leave torchrun out"):
        Student.sharded(model, *args)


def of_rank(rank: int, count: int) -> Student:
    return Student(None, {}, Processes(rank, count))


@pytest.mark.parametrize(("rows", "sizes"), [(5, [5]), (5, [3, 2]), (5, [2, 2, 1]), (2, [1, 1, 0])])
def test_rows_are_sharded_in_order(rows, sizes):
    whole = torch.arange(rows * 2).view(rows, 2)
    shards = [of_rank(rank, len(sizes)).shard(whole) for rank in range(len(sizes))]
    assert [len(shard) for shard in shards] == sizes
    assert torch.equal(torch.cat(shards), whole)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_sequences_of_a_batch_are_shared_and_all_run_as_many_batches(count):
    batches = [sequences(5, seed=1), sequences(2, seed=2)]
    shares = [of_rank(rank, count).share(batches) for rank in range(count)]
    for number, batch in enumerate(batches):
        counted = [s for share in shares for s in share[number][0] if share[number][1] == 1.0]
        assert sorted(counted) == sorted(batch)
        assert all(share[number][0] and share[number][1] in (0.0, 1.0) for share in shares)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes with gloo left (sharded_run.py)."""
    folder = tmp_path_factory.mktemp("sharded")
    ends = started_forks(sharded_run.main, [str(folder)], folder)
    assert [code for code, _ in ends] == [0, 0], ends
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["recomputed", "quantized"])
def test_two_processes_end_as_one(folder, kind):
    actual = load_file(folder / f"{kind}.safetensors")
    result, model = sharded_run.run(kind, Processes())
    curve = torch.tensor([kl for _, kl in result.curve], dtype=torch.float64)
    assert result.kl_after < result.kl_before
    # a sum in another order may round to another code
    rtol = 5e-3 if kind == "quantized" else 1e-4
    torch.testing.assert_close(actual.pop("curve"), curve, rtol=rtol, atol=0)
    start = dense_and_sparse()[1].state_dict()
    for name, weight in model.state_dict().items():
        if kind != "quantized":  # of steps of up to 3e-3
            torch.testing.assert_close(actual[name], weight, rtol=0, atol=3e-4)
        if "proj" in name:
            assert not bool(actual[name][start[name] == 0].any()), name
    assert not torch.equal(actual[f"{NAME}.weight"], start[f"{NAME}.weight"])


@pytest.mark.slow
def test_each_process_holds_half_and_a_killed_run_goes_on(folder):
    """Also in a single process: the run has ended, so that nothing is left to train."""
    ends = [load_file(folder / f"killed-{rank}.safetensors") for rank in range(2)]
    names = dense_and_sparse()[1].named_parameters()
    trained = sum(p.numel() for n, p in names if "embed" not in n and "lm_head" not in n)
    held = [end["held"].unique().tolist() for end in ends]
    assert [len(counts) for counts in held] == [1, 1]
    assert held[0][0] + held[1][0] == trained
    assert abs(held[0][0] - held[1][0]) < 0.01 * trained
    plain = load_file(folder / "plain.safetensors")
    steps = int(plain["steps"])
    left = steps - 2  # two were done when it was killed
    assert [int(end["steps"]) for end in ends] == [left] * 2
    assert all(torch.equal(end["weight"], plain[f"{NAME}.weight"]) for end in ends)
    result, model = sharded_run.run("plain", Processes(), folder / "state")
    assert [kl for _, kl in result.curve] == plain["curve"].tolist()
    assert torch.equal(model.get_parameter(f"{NAME}.weight"), plain[f"{NAME}.weight"])


def test_nothing_outside_of_the_decoder_is_trained():
    model = tiny_gemma(sees=True)
    with in_float32(model):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".language_model.layers." in n or "language_model.norm" in n for n in trained)
