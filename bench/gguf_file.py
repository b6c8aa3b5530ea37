"""GGUF files with random codes: llama.cpp's types on the shapes of `bench.shapes`."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.shapes import MIXTURE, QWEN2


class Block(NamedTuple):
    """Largest value of a code times a scale within the block; bytes where float16 scales start."""

    largest: int
    scales: tuple[int, ...]


BLOCKS = {
    "Q4_0": Block(8, (0,)),
    "Q8_0": Block(127, (0,)),
    "IQ2_XXS": Block(43 * 4, (0,)),
    "Q2_K": Block(3 * 15, (80, 82)),
    "Q3_K": Block(4 * 32, (108,)),
    "Q4_K": Block(15 * 63, (0, 2)),
    "Q5_K": Block(31 * 63, (0, 2)),
    "Q6_K": Block(32 * 127, (208,)),
}
KINDS = ("Q4_0", "Q8_0", "Q4_K_M", "Q3_K_M", "IQ2_XXS")


def type_of(kind: str, name: str, layer: int, layers: int) -> str:
    """Return the type that llama.cpp chooses for a matrix of a file of this kind.

    As in `llama_tensor_get_type` of llama-quant.cpp, but Q4_0 and Q8_0 have their type throughout,
    as with `--pure`.
    """
    if kind in ("Q4_0", "Q8_0"):
        return kind
    if name == "token_embd":  # also the head
        return "Q5_K" if kind == "IQ2_XXS" else "Q6_K"
    eighth = layers // 8
    if kind == "Q4_K_M":
        outer = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        return "Q6_K" if outer and name in ("attn_v", "ffn_down") else "Q4_K"
    if kind == "Q3_K_M":
        first = {"attn_v": 2, "ffn_down": layers // 16, "attn_output": 0}
        if name not in first:
            return "Q3_K"
        return "Q5_K" if layer < first[name] else "Q4_K"
    if name == "attn_v":
        return "Q4_K"
    return "Q2_K" if name == "ffn_down" and layer < eighth else "IQ2_XXS"


def write_gguf(path: Path, kind: str, shape: str, layers: int, vocab: int) -> None:
    """Write a model of a shape, "1.5B" or "30B-A3B", with random codes."""
    import gguf

    mixture = shape == "30B-A3B"
    sizes = MIXTURE if mixture else QWEN2[shape]
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    kv_heads, head = sizes["num_key_value_heads"], sizes.get("head_dim", hidden // heads)
    inner = sizes["moe_intermediate_size" if mixture else "intermediate_size"]
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path.with_suffix(".unfinished"), "qwen3moe" if mixture else "qwen2")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(vocab - 1)
    if mixture:
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_expert_count(sizes["num_experts"])
        writer.add_expert_used_count(sizes["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(inner)

    def floats(name: str, *size: int, value: Any = 1) -> None:
        writer.add_tensor(name, np.broadcast_to(np.float32(value), size).copy())

    def matrix(name: str, rows: int, columns: int, layer: int = 0, experts: int = 0) -> None:
        short = name.rpartition(".")[2]
        form = gguf.GGMLQuantizationType[type_of(kind, short.removesuffix("_exps"), layer, layers)]
        block, size = gguf.GGML_QUANT_SIZES[form]
        count = max(experts, 1) * rows
        codes = draw.integers(0, 256, (count, columns // block, size), dtype=np.uint8)
        largest, scales = BLOCKS[form.name]
        scale = np.full(1, 0.25 / columns**0.5 / largest, np.float16).view(np.uint8)
        for start in scales:
            codes[:, :, start : start + 2] = scale
        leading = (experts, rows) if experts else (rows,)
        writer.add_tensor(f"{name}.weight", codes.reshape(*leading, -1), raw_dtype=form)

    matrix("token_embd", vocab, hidden)
    floats("output_norm.weight", hidden)
    for layer in range(layers):
        at = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            floats(f"{at}.{norm}.weight", hidden)
        for name, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            matrix(f"{at}.attn_{name}", rows, hidden, layer)
            if not mixture:
                floats(f"{at}.attn_{name}.bias", rows, value=0)
        matrix(f"{at}.attn_output", hidden, heads * head, layer)
        experts, suffix = 0, ""
        if mixture:
            experts, suffix = sizes["num_experts"], "_exps"
            for name in ("q", "k"):
                floats(f"{at}.attn_{name}_norm.weight", head)
            router = draw.standard_normal((experts, hidden)) / hidden**0.5
            floats(f"{at}.ffn_gate_inp.weight", experts, hidden, value=router)
        for name, rows, columns in (
            ("gate", inner, hidden),
            ("up", inner, hidden),
            ("down", hidden, inner),
        ):
            matrix(f"{at}.ffn_{name}{suffix}", rows, columns, layer, experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".unfinished").rename(path)
