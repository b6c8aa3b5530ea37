import pytest
import torch

from rac_modifier.checkpoint.packing import pack_checkpoint
from tests.checkpoint.checkpoint_helpers import PRUNERS, Saved, tiny_model
from tests.tiny import linears


@pytest.fixture
def saved(tmp_path) -> Saved:
    """Save a pruned tiny model: its folder, its state dict and the mask structures."""

    def save(structure="2:4", tied=True, shard=None, packed=True, dtype=torch.bfloat16):
        model = tiny_model(tied, dtype)
        modules = {}
        for name, linear in linears(model).items():
            if name != "model.layers.0.self_attn.o_proj":  # one linear stays dense
                PRUNERS[structure](linear.weight.data)
                modules[name] = structure
        folder = tmp_path / "model"
        model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if packed:
            pack_checkpoint(folder, modules, ["model.layers.0.self_attn.o_proj", "lm_head"])
        return folder, expected, modules

    return save
