"""Random damage to all parts of a checkpoint, with a fixed seed: a RacError, or other numbers."""

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rac_modifier.checkpoint.hf_quantizer import load_model
from rac_modifier.checkpoint.pack_plan import plan_packing
from rac_modifier.checkpoint.packing import pack_checkpoint, pack_model, unpack_model
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import plan_checkpoint
from tests.checkpoint.checkpoint_helpers import PRUNERS, save_quantized, tiny_model
from tests.tiny import linears, tiny_tokenizer

MUTATIONS = 40  # of each of the four checkpoints
VALUES = [None, True, -1, 0, 2**62, 1e400, "", "x", "re:(", [], [1], {}, {"a": 1}]


def checkpoint(folder: Path, kind: str) -> Path:
    """Save a tiny model: packed floats, packed int4, packed int8, or dense int4."""
    if kind == "floats":
        model = tiny_model()
        modules = dict.fromkeys(linears(model), "unstructured")
        for linear in linears(model).values():
            PRUNERS["unstructured"](linear.weight.data)
        model.save_pretrained(folder, max_shard_size="60KB")
    else:
        modules = save_quantized(folder, "2:4", kind.removesuffix(" dense"))
    if not kind.endswith("dense"):
        pack_checkpoint(folder, modules, ["lm_head"])
    tiny_tokenizer().save_pretrained(folder)
    return folder


def mutated_json(value: Any, rng: random.Random) -> Any:
    """Change one value of a tree: another value, or none."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        changed = {name: item for name, item in value.items() if name != key}
        return changed if rng.random() < 0.1 else {**changed, key: mutated_json(value[key], rng)}
    return rng.choice(VALUES)


def damage(folder: Path, rng: random.Random) -> bool:
    """Damage one file: a value of JSON, or bytes of its text; the header or the data of weights.

    Returns whether our readers must agree; transformers alone reads all of config.json.
    """
    files = [*folder.glob("*.safetensors"), *folder.glob("*.json")]
    path = rng.choice(sorted(file for file in files if not file.name.startswith("tokenizer")))
    data = bytearray(path.read_bytes())
    if path.suffix == ".json" and rng.random() < 0.8:
        config = json.loads(data)
        if path.name == "config.json" and rng.random() < 0.7:
            key = rng.choice(
                [key for key in ("quantization_config", "rac_sparsity") if key in config]
            )
            config[key] = mutated_json(config[key], rng)
            path.write_text(json.dumps(config))
            return True
        path.write_text(json.dumps(mutated_json(config, rng)))
        return path.name != "config.json"
    header = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
    kind = rng.randrange(4)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        digits = [place for place in range(8, header) if chr(data[place]).isdigit()]
        for place in rng.sample(digits, 2):
            data[place] = ord(rng.choice("0123456789"))
    else:
        first, last = (0, header) if kind == 2 else (header % len(data), len(data))
        for _ in range(rng.randrange(1, 200)):
            data[rng.randrange(first, last)] = rng.randrange(256)
    path.unlink()  # a new file: the old one may still be mapped
    path.write_bytes(data)
    return path.name != "config.json"


def inspected(folder: Path) -> None:
    report, _ = plan_checkpoint(folder)
    for row in report.modules:
        if row.problem is not None:
            raise RacError(row.problem)


def packed(folder: Path) -> None:
    pack_model(plan_packing(folder), folder.with_name("packed"), "owner/base")


def unpacked(folder: Path) -> None:
    unpack_model(folder, folder.with_name("unpacked"))


def checked(folder: Path) -> None:
    """Check as `rac prune --check` does, which reads no weights."""
    from rac_modifier import cli

    words = ["prune", str(folder), f"{folder}.out", "-r", "rac_2of4", "--check"]
    cli.app(words, standalone_mode=False)


def loaded_by_transformers(folder: Path) -> bool:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception:  # it has many
        return False
    return True


READERS: list[Callable[[Path], Any]] = [inspected, packed, unpacked, load_model]


@pytest.mark.parametrize("kind", ["floats", "w4", "w8a8", "w4 dense"])
def test_all_readers_refuse_the_same_damage_and_raise_no_error_but_ours(tmp_path, kind):
    clean = checkpoint(tmp_path / "clean", kind)
    rng = random.Random(kind)

    def verdicts(folder: Path, readers: list[Callable[[Path], Any]]) -> dict[str, str]:
        found = {}
        for reader in readers:
            for name in "packed", "unpacked":
                shutil.rmtree(tmp_path / name, ignore_errors=True)
            found[reader.__name__] = "sound"
            try:
                reader(folder)
            except RacError as error:
                found[reader.__name__] = str(error)
        return found

    # pack takes no packed model, unpack no dense one
    sound = verdicts(clean, READERS)
    readers = [reader for reader in READERS if sound[reader.__name__] == "sound"]
    assert len(readers) == 3
    refused = 0
    for _ in range(MUTATIONS):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(clean, folder)
        comparable = damage(folder, rng)
        found = verdicts(folder, readers)
        with contextlib.suppress(RacError):
            checked(folder)
        # of dense codes it starts missing tensors at random, and checks none
        if (loads := found["load_model"] == "sound") or not kind.endswith("dense"):
            assert loaded_by_transformers(folder) == loads, found
        refusals = [text for text in found.values() if text != "sound"]
        refused += bool(refusals)
        if comparable and not any(" cannot be loaded (" in text for text in refusals):
            assert len(refusals) in (0, len(readers)), found
    assert MUTATIONS // 4 < refused < MUTATIONS


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_no_raw_error(tmp_path, name):
    folder, rng, refused = checkpoint(tmp_path / "model", "floats"), random.Random(name), 0
    clean = json.loads((folder / name).read_text())
    for _ in range(MUTATIONS):
        (folder / name).write_text(json.dumps(mutated_json(clean, rng)))
        try:
            checked(folder)
        except RacError:
            refused += 1
    assert MUTATIONS // 4 < refused < MUTATIONS


def add_tensor_of_4_bits(folder: Path) -> None:
    """Add eight values of F4, which safetensors has and torch lacks."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8:start]), data[start:]
    places = [len(values), len(values) + 4]
    header["extra"] = {"dtype": "F4", "shape": [8], "data_offsets": places}
    text = json.dumps(header).encode()
    path.unlink()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values + bytes(4))


def forget_how_to_scale(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["config_groups"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (add_tensor_of_4_bits, r"F4 is not supported|not a tensor of the model"),
        (forget_how_to_scale, r"config\.json quantizes no module"),
    ],
)
@pytest.mark.parametrize("reader", [inspected, unpacked, load_model])
def test_what_one_reader_used_to_take_is_refused_by_all(tmp_path, change, says, reader):
    folder = checkpoint(tmp_path / "model", "w8a8")
    change(folder)
    with pytest.raises(RacError, match=says):
        reader(folder)
