"""A byte-level tokenizer with thinking tags, a tiny random Qwen3, and a generate that says what a script tells it."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rac_modifier.traces.generation import Generation

TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n"
    "{% endif %}"
)


def byte_tokenizer(*, thinking_tags: bool = True, chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    letters = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    if thinking_tags:
        core.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def tiny_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


class Scripted:
    """Answers each key with its text, and with EOS unless the text ends in an ellipsis."""

    def __init__(self, script: dict[str, str]):
        self.script, self.batches, self.settings = script, [], []

    def __call__(self, model, tokenizer, prompts, settings, keys):
        self.batches.append([len(prompt) for prompt in prompts])
        self.settings.append(settings)
        return [self._answer(tokenizer, self.script[key]) for key in keys]

    @staticmethod
    def _answer(tokenizer, text: str) -> Generation:
        finished = not text.endswith("...")
        ids = tokenizer.encode(text.removesuffix("..."), add_special_tokens=False)
        return Generation((*ids, tokenizer.eos_token_id) if finished else tuple(ids), "stop" if finished else "length")
