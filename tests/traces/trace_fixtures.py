"""A tiny random Qwen3, a byte-sized tokenizer with a chat template, and a runner that can be killed."""

import os
import time

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>", "<think>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>{% endif %}{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    letters = SPECIAL + [chr(c) for c in range(32, 127)] + ["<unk>"]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(letters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=chat_template
    )


def tiny_model(seed: int = 0, tied: bool = True, context: int = 512) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.generation_config.eos_token_id = 1
    return model


def collect_slowly(path: str, settings: dict[str, object], tokens: int) -> None:
    """Entry point of a process that will be killed: writes each line in pieces, so that kills tear lines too."""
    from rac_modifier.traces.collect import collect_traces
    from rac_modifier.traces.generation import SamplingSettings
    from rac_modifier.traces.problems import ProblemSource

    torch.set_num_threads(1)
    write = os.write

    def write_in_pieces(fd: int, data: memoryview) -> int:
        time.sleep(0.01)
        return write(fd, data[:200])

    os.write = write_in_pieces  # type: ignore[assignment]
    collect_traces(
        tiny_model(),
        tiny_tokenizer(),
        path,
        problems=ProblemSource(),
        sampling=SamplingSettings(**settings),  # type: ignore[arg-type]
        tokens=tokens,
        progress=False,
    )
