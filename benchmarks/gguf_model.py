"""A model of the shape of Qwen2-1.5B in llama.cpp's file format, with random weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 1536, 8960, 12, 2
# the largest value of a code (times that of a scale within the block), and where in a block its float16 scales are
LARGEST = {
    "Q4_0": (8, (0,)),
    "Q8_0": (127, (0,)),
    "Q4_K": (15 * 63, (0, 2)),
    "Q6_K": (32 * 127, (208,)),
}


def write_gguf(path: Path, type_name: str, layers: int, vocab: int) -> None:
    """A model of random codes in blocks, with scales in float16; a tied head. Nothing if the file exists.

    `type_name` is Q4_0, Q8_0 or Q4_K_M: Q4_K, with Q6_K for the embedding and, in the layers that llama.cpp chooses, v and down.
    """
    if path.exists():
        return
    mixed = type_name == "Q4_K_M"
    usual = gguf.GGMLQuantizationType["Q4_K" if mixed else type_name]
    finer = gguf.GGMLQuantizationType.Q6_K if mixed else usual
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

    def matrix(name: str, rows: int, columns: int, kind: gguf.GGMLQuantizationType = usual) -> None:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        codes = draw.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        largest, scales = LARGEST[kind.name]
        for start in scales:
            codes[:, :, start : start + 2] = np.full(
                1, 0.25 / columns**0.5 / largest, np.float16
            ).view(np.uint8)
        writer.add_tensor(name, codes.reshape(rows, -1), raw_dtype=kind)

    matrix("token_embd.weight", vocab, HIDDEN, finer)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(layers):
        eighth = layers // 8
        here = (
            finer if layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2 else usual
        )
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(HIDDEN, np.float32))
        for part, rows in (("q", HIDDEN), ("k", kv), ("v", kv)):
            matrix(f"blk.{layer}.attn_{part}.weight", rows, HIDDEN, here if part == "v" else usual)
            writer.add_tensor(f"blk.{layer}.attn_{part}.bias", np.zeros(rows, np.float32))
        matrix(f"blk.{layer}.attn_output.weight", HIDDEN, HIDDEN)
        matrix(f"blk.{layer}.ffn_gate.weight", INTERMEDIATE, HIDDEN)
        matrix(f"blk.{layer}.ffn_up.weight", INTERMEDIATE, HIDDEN)
        matrix(f"blk.{layer}.ffn_down.weight", HIDDEN, INTERMEDIATE, here)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".unfinished").rename(path)
