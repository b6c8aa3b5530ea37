"""Trainers that are not ours keep the zeros inside `fixed_mask`."""

import pytest
import torch

import rac_modifier
from rac_modifier.checkpoint.pack_plan import plan_packing
from rac_modifier.checkpoint.packing import pack_model
from tests.recovery.recovery_helpers import dense_and_sparse
from tests.tiny import tiny_tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'rac-modifier[trl]'")


@pytest.fixture
def packed(tmp_path):
    """A sparse model as a user has it: packed on disk, and loaded."""
    _, sparse = dense_and_sparse()
    sparse.save_pretrained(tmp_path / "sparse")
    tiny_tokenizer().save_pretrained(tmp_path / "sparse")
    pack_model(plan_packing(tmp_path / "sparse"), tmp_path / "packed", "sparse")
    return rac_modifier.load_model(tmp_path / "packed")


def trained(model, tmp_path, **options):
    """After a few steps of TRL's SFTTrainer."""
    from datasets import Dataset

    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    training = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_length": 64, "seed": 0}
    machine = {"report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False}
    config = trl.SFTConfig(output_dir=str(tmp_path), **batches, **training, **machine)
    data = Dataset.from_dict({"text": [f"{i} plus {i} is {2 * i}" for i in range(40)]})
    options |= {"args": config, "train_dataset": data, "processing_class": tiny_tokenizer()}
    trainer = trl.SFTTrainer(model=model, **options)
    trainer.train()
    return trainer.model


@pytest.mark.parametrize("adapters", [False, True])
def test_trls_sft_trainer_keeps_every_zero_of_a_packed_model(packed, tmp_path, adapters):
    """Also where TRL adds adapters, which are merged under the mask."""
    before, options = {name: p.detach().clone() for name, p in packed.named_parameters()}, {}
    if adapters:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        options["peft_config"] = lora
    with rac_modifier.fixed_mask(packed):
        model = trained(packed, tmp_path, **options)
        model = model.merge_and_unload() if adapters else model
    for name, parameter in model.named_parameters():
        if "proj" in name:
            assert torch.equal(parameter == 0, before[name] == 0), name
            assert not torch.equal(parameter, before[name]), name
