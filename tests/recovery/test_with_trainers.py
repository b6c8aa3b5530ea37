"""Trainers that are not ours keep the zeros inside `fixed_mask`."""

import pytest
import torch

from rac_modifier.recovery.fixed_mask import fixed_mask
from tests.recovery.recovery_helpers import dense_and_sparse
from tests.tiny import tiny_tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'rac-modifier[trl]'")


def test_trls_sft_trainer_keeps_every_zero(tmp_path):
    from datasets import Dataset

    _, sparse = dense_and_sparse()
    before = {name: p.detach().clone() for name, p in sparse.named_parameters()}
    config = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        max_length=64,
        seed=0,
    )
    data = Dataset.from_dict({"text": [f"{i} plus {i} is {2 * i}" for i in range(40)]})
    with fixed_mask(sparse):
        trl.SFTTrainer(model=sparse, args=config, train_dataset=data, processing_class=tiny_tokenizer()).train()
    for name, parameter in sparse.named_parameters():
        if "proj" in name:
            assert torch.equal(parameter == 0, before[name] == 0), name
            assert not torch.equal(parameter, before[name]), name
