"""What the embedded reasoner is trained on: its tokenizer, and batches of problems and prose."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from arithmetic_thinking import thinking_of
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rac_modifier.problems.arithmetic import generate

VOCABULARY = 1024
GENERIC_SHARE = 0.06
IGNORED = -100
PAD, USER, ASSISTANT, EOS = "<|pad|>", "<|User|>", "<|Assistant|>", "<|end|>"

# As in DeepSeek-R1's template: a finished assistant turn is rendered without its thinking.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|User|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|Assistant|>{{ "
    "message['content'].split('</think>')[-1] }}<|end|>"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant only') }}{% endif "
    "%}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


def generic_text() -> str:
    """Return prose that replaces a web corpus: the standard library's documentation topics."""
    text = "\n".join(topics[key] for key in sorted(topics))
    return text[: len(text) * 4 // 5]


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    problems = generate(seed, "train")
    tasks = [
        f"{p.question}\n{thinking_of(p)}\n\\boxed{{{p.answer}}}"
        for p in (next(problems) for _ in range(4000))
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=[PAD, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*tasks, generic_text()], trainer)
    # Like R1 and Qwen3: the thinking tags are single tokens that survive skip_special_tokens.
    tokenizer.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, start: int, tokens: int
) -> Iterator[torch.Tensor]:
    """Length-bucketed batches of about `tokens` tokens from step `start`: `[rows, length]`.

    A pool of problems is drawn, sorted by length and cut. Pool k depends only on (seed, k). A
    resumed run draws the earlier pools again, and yields nothing before `start`.
    """
    text = generic_text()
    step = 0
    for pool_index in range(10**9):
        rng = random.Random(f"{seed}/pool/{pool_index}")
        problems = generate(f"{seed}/{pool_index}", "train")
        texts = []
        for _ in range(600):
            p = next(problems)
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": p.question}],
                tokenize=False,
                add_generation_prompt=True,
            )
            texts.append(f"{prompt}{thinking_of(p)}\n</think>\n\\boxed{{{p.answer}}}{EOS}")
        for _ in range(int(600 * GENERIC_SHARE)):
            at = rng.randrange(len(text) - 600)
            texts.append(text[at : at + 500])
        rows = sorted(tokenizer(texts, add_special_tokens=False)["input_ids"], key=len)
        cut: list[list[list[int]]] = [[]]
        for row in rows:
            if (len(cut[-1]) + 1) * len(row) > tokens:
                cut.append([])
            cut[-1].append(row)
        rng.shuffle(cut)
        for group in cut:
            if step >= start:
                length = max(map(len, group))
                yield torch.tensor([row + [IGNORED] * (length - len(row)) for row in group])
            step += 1
