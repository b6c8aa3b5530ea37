"""Mistakes about the checkpoint."""

from tests.bad_inputs.bench import Bench, Cases

CASES = Cases()


@CASES.case("an output folder that is in use", "is in use; name an empty or a new one")
def _(b: Bench) -> None:
    b.prune(output_dir=str(b.tmp))


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
