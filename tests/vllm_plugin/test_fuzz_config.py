"""Random damage to what config.json says: vLLM's config refuses it by name, or gives methods."""

import json
import random
from types import SimpleNamespace

import pytest

from tests.vllm_plugin.vllm_fixtures import needs_vllm

needs_vllm()

from vllm.model_executor.layers import linear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import plan_checkpoint
from rac_modifier.vllm_plugin.config import RacConfig
from tests.checkpoint.test_fuzz_packed import checkpoint, mutated_json
from tests.vllm_plugin.test_config import bare

MUTATIONS = 150
# What rac inspect does not read: whether the option has an effect, what vLLM alone parses.
OF_SERVING = (
    "--quantization rac: it has no effect",
    "config.json: quantization_config: vLLM cannot read it",
    "config.json: quantization_config.transform_config",
)
KEYS = ("quantization_config", "rac_sparsity")


def configured(folder, config):
    """What vLLM asks of a config before it loads tensors."""
    ours = SimpleNamespace(**{key: config[key] for key in KEYS if key in config})
    entry = config.get("quantization_config")
    RacConfig.override_quantization_method(entry, "rac", hf_config=ours)
    made = RacConfig.from_config(entry)
    made.maybe_update_config(str(folder), hf_config=ours)
    made.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    for kind, name in (
        (linear.QKVParallelLinear, "self_attn.qkv_proj"),
        (linear.RowParallelLinear, "mlp.down_proj"),
    ):
        made.get_quant_method(bare(kind), f"model.layers.0.{name}")
    made.get_quant_method(bare(ParallelLMHead), "lm_head")


def verdict(read) -> str | None:
    """Return what is refused, None if nothing; other errors end the test."""
    try:
        read()
    except RacError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["floats", "w4", "w8a8", "w4 dense"])
def test_vllm_refuses_what_rac_inspect_refuses_of_a_config(tmp_path, kind):
    folder = checkpoint(tmp_path / "model", kind)
    path, rng, refused = folder / "config.json", random.Random(kind), 0
    clean = json.loads(path.read_text())
    configured(folder, clean)
    for _ in range(MUTATIONS):
        key = rng.choice([key for key in KEYS if key in clean])
        config = {**clean, key: mutated_json(clean[key], rng)}
        text = json.dumps(config)
        if not isinstance(config["quantization_config"], dict) or "Infinity" in text:
            continue  # which vLLM reads itself
        path.write_text(text)
        served = verdict(lambda: configured(folder, config))  # noqa: B023 - called here
        inspected = verdict(lambda: plan_checkpoint(folder))
        refused += served is not None
        if served is None:  # what its readers refuse of tensors is refused later
            assert inspected is None or "config.json" in inspected.split(": ")[-1], inspected
        elif not served.startswith(OF_SERVING):
            assert inspected is not None, served
    assert refused > MUTATIONS // 10
