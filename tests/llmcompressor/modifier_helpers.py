"""What tests of modifiers share: models as plain weights, other modifiers, and data for those."""

import torch
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from torch.utils.data import DataLoader

INT8 = {"config_groups": {"w": {"weights": {"num_bits": 8, "strategy": "channel"}}}}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def int4(bits: int = 4, symmetric: bool = True, targets: tuple[str, ...] = ("Linear",)) -> dict:
    """W4A16 in groups of 32, as config_groups: the preset's 128 are more than the tiny model
    has."""
    weights = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": symmetric}
    return {"config_groups": {"group_0": {"targets": list(targets), "weights": weights}}}


def upstreams_sparsegpt(mask_structure: str = "2:4") -> SparseGPTModifier:
    where = {"targets": ["Linear"], "ignore": ["lm_head"]}
    return SparseGPTModifier(sparsity=0.5, mask_structure=mask_structure, **where)


def gptq_w4() -> GPTQModifier:
    return GPTQModifier(ignore=["lm_head"], **int4())


def generic_loader(count: int = 6) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    rows = [{"input_ids": torch.randint(2, 300, (40,), generator=generator)} for _ in range(count)]
    for row in rows:
        row["attention_mask"] = torch.ones(40, dtype=torch.long)
    return DataLoader(rows, batch_size=1)
