"""Tiny random Qwen3 models with their tokenizers, for all tests."""

from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)

NAME = "ReasoningAwareSparseGPTModifier"
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>", "<think>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
BYTE_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt "
    "%}<|assistant|><think>\n"
    "{% endif %}"
)
TOKENS = 1500


def tiny_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token a printable ASCII character; 102 in all."""
    letters = SPECIAL + ["\n"] + [chr(c) for c in range(32, 127)] + ["<unk>"]
    vocabulary = {token: i for i, token in enumerate(letters)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def byte_tokenizer(*, thinking_tags: bool = True) -> PreTrainedTokenizerFast:
    """A token a byte, so that any text can be read back."""
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    letters = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    if thinking_tags:
        core.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=BYTE_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
    "initializer_range": 0.1,  # so that logits differ and activations have a structure
}  # fmt: skip


def tiny_model(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """In evaluation mode; `changes` to its config. Head and embedding are tied only if told to."""
    torch.manual_seed(seed)
    settings = {**SIZES, "intermediate_size": 128, **changes}
    model = Qwen3ForCausalLM(Qwen3Config(**settings)).eval()
    model.generation_config.eos_token_id = 1
    return model


def tiny_gemma(seed: int = 0, *, sees: bool = False) -> PreTrainedModel:
    """A Gemma 3, whose norms return the dtype that they read; with a vision tower if it `sees`."""
    torch.manual_seed(seed)
    text = {**SIZES, "intermediate_size": 128, "sliding_window": 64}
    config = Gemma3TextConfig(**text)
    if sees:
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        tower |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        config = Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = 1
    return model


EXPERTS = 4
_QWEN = {"moe_intermediate_size": 32, "num_experts": EXPERTS}
_MIXTRAL = {"intermediate_size": 32, "num_local_experts": EXPERTS, "sliding_window": None}
_OF_EXPERTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3": (Qwen3MoeConfig, _QWEN),
    "qwen2": (Qwen2MoeConfig, {**_QWEN, "shared_expert_intermediate_size": 48}),
    "mixtral": (MixtralConfig, _MIXTRAL),
}


def save_tiny_experts(folder: Path, kind: str = "qwen3", seed: int = 0, **changes: Any) -> Path:
    """A tiny mixture of experts with its tokenizer: two of four experts per token."""
    torch.manual_seed(seed)
    config, sizes = _OF_EXPERTS[kind]
    settings = {**SIZES, "num_experts_per_tok": 2, **sizes, **changes}
    model = AutoModelForCausalLM.from_config(config(**settings))
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_tiny(
    folder: Path, chat_template: str | None = TEMPLATE, seed: int = 0, **changes: Any
) -> Path:
    tiny_model(seed, **changes).save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder


def entry(store: Path | None = None, **changes: Any) -> dict[str, Any]:
    """The settings of a small 2:4 run that holds no traces out."""
    sampling = {"temperature": 1.0, "max_new_tokens": 40, "batch_size": 16}
    traces: dict[str, Any] = {"sampling": sampling}
    if store is not None:
        traces["store"] = str(store)
    settings: dict[str, Any] = {
        "mask_structure": "2:4",
        "traces": traces,
        "calibration": {"tokens": TOKENS, "batch_tokens": 512},
    }
    settings |= changes
    calibration = settings["calibration"]
    if isinstance(calibration, dict) and "traces" in str(calibration.get("mixture", "traces")):
        settings["calibration"] = {"held_out_tokens": 0, **calibration}
    elif "traces" not in changes:  # of no effect beside a mixture without traces
        del settings["traces"]
    return settings


def calibration_entry(store: Path | None = None, **changes: Any) -> dict[str, Any]:
    """The same for the modifier that calibrates others."""
    settings = entry(store, **changes)
    del settings["mask_structure"], settings["calibration"]["batch_tokens"]
    return settings


def recipe(settings: dict[str, Any], **later: dict[str, Any]) -> str:
    """Our modifier's entry, and `later` modifiers in a stage behind it, as YAML."""
    stages: dict[str, Any] = {"pruning_stage": {"pruning_modifiers": {NAME: settings}}}
    if later:
        stages["quant_stage"] = {"quant_modifiers": later}
    return yaml.safe_dump(stages, sort_keys=False)


def linears(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The linear layers that are pruned by default."""
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    return {name: module for name, module in modules if name != "lm_head"}


def is_2of4(weight: torch.Tensor) -> bool:
    return bool(((weight.reshape(-1, 4) == 0).sum(dim=1) >= 2).all())
