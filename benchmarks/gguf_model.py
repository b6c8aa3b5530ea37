"""A model of the shape of Qwen2-1.5B in llama.cpp's file format, with random weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 1536, 8960, 12, 2


def write_gguf(path: Path, type_name: str, layers: int, vocab: int) -> None:
    """A model of random codes in blocks of 32 with a scale in float16; a tied head. Nothing if the file exists."""
    if path.exists():
        return
    kind = gguf.GGMLQuantizationType[type_name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path.with_suffix(".unfinished"), "qwen2")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type_name}"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(vocab - 1)

    def matrix(name: str, rows: int, columns: int) -> None:
        codes = draw.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        codes[:, :, :2] = np.full(1, 0.25 / columns**0.5 / (8 if size < block else 127), np.float16).view(np.uint8)
        writer.add_tensor(name, codes.reshape(rows, -1), raw_dtype=kind)

    matrix("token_embd.weight", vocab, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(HIDDEN, np.float32))
        for part, rows in (("q", HIDDEN), ("k", kv), ("v", kv)):
            matrix(f"blk.{layer}.attn_{part}.weight", rows, HIDDEN)
            writer.add_tensor(f"blk.{layer}.attn_{part}.bias", np.zeros(rows, np.float32))
        matrix(f"blk.{layer}.attn_output.weight", HIDDEN, HIDDEN)
        matrix(f"blk.{layer}.ffn_gate.weight", INTERMEDIATE, HIDDEN)
        matrix(f"blk.{layer}.ffn_up.weight", INTERMEDIATE, HIDDEN)
        matrix(f"blk.{layer}.ffn_down.weight", HIDDEN, INTERMEDIATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".unfinished").rename(path)
