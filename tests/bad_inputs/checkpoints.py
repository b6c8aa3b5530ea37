"""Mistakes about the checkpoint."""

import json
import shutil

from tests.bad_inputs.bench import Bench, Cases

CASES = Cases()


@CASES.case("an output folder that is in use", "is in use; name an empty or a new one")
def _(b: Bench) -> None:
    b.prune(output_dir=str(b.tmp))


@CASES.case("saving 2:4 weights whose zeros another run filled", "no longer holds its pattern")
def _(b: Bench) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(b.folder)
    b.prune(model=model)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    model.save_pretrained(b.tmp / "out")


@CASES.case(
    "a packed checkpoint in transformers, with a damaged weight",
    "keep exactly two; the checkpoint is damaged",
)
def _(b: Bench) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    b.prune(output_dir=str(b.tmp / "out"))
    tensors = load_file(b.tmp / "out" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bitmask"][0, 0] = 255
    save_file(tensors, b.tmp / "out" / "model.safetensors", {"format": "pt"})
    AutoModelForCausalLM.from_pretrained(b.tmp / "out")


@CASES.case(
    "a packed checkpoint beside another config.json", "restore the config.json that packing wrote"
)
def _(b: Bench) -> None:
    from rac_modifier import load_model

    b.prune(output_dir=str(b.tmp / "out"))
    shutil.copy(b.folder / "config.json", b.tmp / "out" / "config.json")
    load_model(b.tmp / "out")


@CASES.case(
    "activations of a dense model whose activations are quantized",
    "its activations are quantized already, and no kernel takes them",
)
def _(b: Bench) -> None:
    inputs = {"num_bits": 8, "type": "float", "strategy": "token"}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    shutil.copytree(b.folder, b.tmp / "model")
    file = b.tmp / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {**quantization, "config_groups": {"g": group}}
    file.write_text(json.dumps(config))
    b.rac("inspect", b.tmp / "model", "--activations", 0.01)
