"""The tokenizer in the header of a GGUF file, with its chat template; the tensors behind it need not be there."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _LIST = 8, 9
# Qwen2's, which "deepseek-r1-qwen" shares.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NORMAL = 1


def read_header(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file."""
    with path.open("rb") as file:
        magic, _version, _tensors, count = struct.unpack("<4sIQQ", file.read(24))
        assert magic == b"GGUF"
        return {_text(file): _value(file, *_read(file, "I")) for _ in range(count)}


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """As transformers would make it from the same model's own files."""
    header = read_header(path)
    tokens, types = header["tokenizer.ggml.tokens"], header["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in header["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind != _NORMAL]
    # The thinking tags stay when special tokens are left out of a text, as in the model's own tokenizer_config.json.
    core.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in special if "think>" not in t]
    )
    core.add_tokens([AddedToken(t, normalized=False) for t in special if "think>" in t])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[header["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[header["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[header["tokenizer.ggml.padding_token_id"]],
        chat_template=header["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )


def _read(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _text(file: BinaryIO) -> str:
    (length,) = _read(file, "Q")
    return file.read(length).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind == _LIST:
        inner, count = _read(file, "IQ")
        return [_value(file, inner) for _ in range(count)]
    return _read(file, _NUMBERS[kind])[0]
