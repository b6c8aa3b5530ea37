"""llm-compressor on our traces. `python -m tests.llmcompressor.test_matrix` writes the table.

`python -m tests.llmcompressor.test_matrix .venv-serve/bin/vllm` serves every checkpoint first.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_modifier import RacError, load_model
from tests.llmcompressor.conftest import record_of
from tests.tiny import calibration_entry, save_tiny, save_tiny_experts

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quantization.md"
SERVED = Path(__file__).with_name("matrix_served.json")
MARKS = "<!-- matrix: python -m tests.llmcompressor.test_matrix -->\n", "<!-- end of matrix -->\n"
TOKENS = 400
ALL = "all"
ROWS = "all but an incomplete last row"  # AutoRound's
READS_NOTHING = "calibrates nothing"
SAME = "with the same logits"
REFUSED = "refused: transformers applies no rotation to activations"
# The smallest heads of vLLM's attention on a CPU, and the length that `bench schemes` serves.
SERVABLE = {"head_dim": 32, "max_position_embeddings": 1024}
# Multiples of 128, the largest group of the schemes.
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_key_value_heads": 4,
    **SERVABLE,
}
KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@dataclass
class Case:
    """A recipe: `scheme` for its last modifier, which the other `modifiers` precede."""

    modifiers: str
    scheme: str
    settings: list[dict[str, Any]] = field(default_factory=list)
    seen: str = ALL
    refused: str = ""
    loads: bool = True

    def __str__(self) -> str:
        return f"{self.modifiers}-{self.scheme}"

    def recipe(self) -> dict[str, dict[str, Any]]:
        names = [f"{name}Modifier" for name in self.modifiers.split(", ")]
        return dict(zip(names, self.settings, strict=True))

    def outcome(self, served: dict[str, str]) -> tuple[str, str, str, str]:
        if self.refused:
            return self.modifiers, f"refused: {self.refused}", "", ""
        loads = SAME if self.loads else REFUSED
        return self.modifiers, self.seen, loads, served.get(str(self), "").partition(":")[0]


def cases(
    modifiers: str,
    schemes: str,
    first: tuple[dict[str, Any], ...] = (),
    more: Any = None,
    **changes: Any,
) -> list[Case]:
    """One case per preset scheme of the last modifier."""
    last = {"targets": ["Linear"], "ignore": ["lm_head"], **(more or {})}
    return [
        Case(modifiers, scheme, [*first, {"scheme": scheme, **last}], **changes)
        for scheme in schemes.split()
    ]


def observed(observer: str) -> dict[str, Any]:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "observer": observer}
    return {
        "config_groups": {"g": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


FLOAT = "FP8 FP8_DYNAMIC FP8_BLOCK W4AFP8 NVFP4 NVFP4A16 MXFP4 MXFP8"
TUNED = {"iters": 2, "enable_torch_compile": False}
PRUNED = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}
NEAREST, AUTOROUND = "Quantization", "AutoRound"
CASES = [
    *cases("GPTQ", f"W4A16 W4A16_ASYM W8A8 {FLOAT}"),
    Case("GPTQ", "int4, observer imatrix_mse", [observed("imatrix_mse")]),
    Case("GPTQ", "int4, observer mse", [observed("mse")]),
    *cases(NEAREST, "FP8 NVFP4"),
    Case(NEAREST, "int4, observer imatrix_mse", [observed("imatrix_mse")]),
    Case(NEAREST, "KV cache FP8", [{"kv_cache_scheme": KV}]),
    *cases(
        NEAREST,
        "W4A16 W4A16_ASYM W8A8 FP8_DYNAMIC FP8_BLOCK W4AFP8 NVFP4A16 MXFP4 MXFP8",
        refused=READS_NOTHING,
    ),
    Case(NEAREST, "int4, observer mse", [observed("mse")], refused=READS_NOTHING),
    *cases("AWQ, Quantization", "W4A16 W4A16_ASYM W8A8 FP8_DYNAMIC", ({},)),
    *cases("SmoothQuant, Quantization", "W8A8 FP8", ({},)),
    *cases("SmoothQuant, GPTQ", "W8A8", ({},)),
    *cases(AUTOROUND, "W4A16 W8A8 FP8 FP8_DYNAMIC W4AFP8 NVFP4 MXFP4 MXFP8", more=TUNED, seen=ROWS),
    *cases(AUTOROUND, "W4A16_ASYM", more=TUNED, refused="symmetric: false"),
    *cases(AUTOROUND, "FP8_BLOCK NVFP4A16", more=TUNED, refused="no rounding"),
    *cases("SpinQuant, GPTQ", "W4A16", ({"rotations": ["R1", "R2"]},)),
    Case(
        "SpinQuant, GPTQ",
        "W4A16 with rotation R4",
        [{"rotations": ["R1", "R2", "R4"]}, *cases("GPTQ", "W4A16")[0].settings],
        loads=False,
    ),
    *cases("QuIP, GPTQ", "W4A16", ({"transform_type": "hadamard"},), loads=False),
    Case("SparseGPT", "2:4", [PRUNED]),
    Case("WandaPruning", "2:4", [PRUNED]),
    Case("REAPPruning", "half of the experts", [{"sparsity": 0.5}]),
]
QUICK = {
    "GPTQ-NVFP4",
    "Quantization-W8A8",
    "Quantization-KV cache FP8",
    "AWQ, Quantization-W4A16_ASYM",
    "AutoRound-W4A16",
    "AutoRound-W4A16_ASYM",
    "AutoRound-FP8_BLOCK",
    "QuIP, GPTQ-W4A16",
    "REAPPruning-half of the experts",
}


def marked(case: Case) -> Any:
    marks = [] if str(case) in QUICK else [pytest.mark.slow]
    return pytest.param(case, id=str(case), marks=marks)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return dense_models(tmp_path_factory.mktemp("matrix"))


def dense_models(folder: Path) -> dict[bool, Path]:
    """A dense model and a mixture of experts in bfloat16, which loaded FP4 weights need."""
    experts = save_tiny_experts(folder / "experts", **SERVABLE)
    models = {False: save_tiny(folder / "dense", **WIDE), True: experts}
    for path in models.values():
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    return models


def recipe_of(case: Case, store: Path) -> str:
    ours = calibration_entry(store, calibration={"tokens": TOKENS, "batch_tokens": 512})
    modifiers = {"ReasoningAwareCalibrationModifier": ours, **case.recipe()}
    return yaml.safe_dump({"a_stage": {"a_modifiers": modifiers}}, sort_keys=False)


class Pass:
    """Tokens of the calibration batches, and tokens that a target read, per forward pass."""

    def __init__(self, target: torch.nn.Module, monkeypatch: pytest.MonkeyPatch):
        self.given: list[int] = []
        self.read: list[int] = []
        run = SequentialPipeline.__call__

        def recorded(model, dataloader, dataset_args):
            self.given += [batch["input_ids"].numel() for batch in dataloader]
            with target.register_forward_pre_hook(self._count):
                run(model, dataloader, dataset_args)

        monkeypatch.setattr(SequentialPipeline, "__call__", staticmethod(recorded))

    def _count(self, module, arguments):
        if not HooksMixin._HOOKS_DISABLED:  # else upstream computes the next layer's inputs
            self.read.append(arguments[0].shape[:-1].numel())


@pytest.mark.parametrize("case", map(marked, CASES))
def test_a_modifier_runs_on_our_traces(case, folders, tmp_path, monkeypatch):
    folder = folders[case.modifiers == "REAPPruning"]
    store, out = folder.with_suffix(".jsonl"), tmp_path / "out"
    if case.refused:
        store = tmp_path / "unused.jsonl"
    recipe = recipe_of(case, store)
    model = AutoModelForCausalLM.from_pretrained(folder)
    calibration = Pass(model.model.layers[0].self_attn.q_proj, monkeypatch)
    if case.refused:
        with pytest.raises(RacError, match=case.refused):
            oneshot(model=model, recipe=recipe, output_dir=str(out))
        assert not store.exists()
        return
    oneshot(model=model, recipe=recipe, output_dir=str(out))
    record, given, read = record_of(out), calibration.given, calibration.read
    assert record["base_model"] == folder.name
    assert record["method"].partition(", ")[0] in case.recipe()
    assert "pattern" not in record
    assert record["calibration"]["tokens"] == TOKENS
    assert read[: len(given)] == given  # no padding, nothing twice
    if case.seen == ROWS:
        assert TOKENS - given[0] < sum(given) <= TOKENS
        assert len(set(given)) == 1 < len(given)
        assert len(read) > len(given)  # it goes on to train on them
    else:
        assert read == given
        assert sum(given) in (TOKENS, 2 * TOKENS)  # once per modifier that calibrates
    if not case.loads:
        with pytest.raises(RacError, match="rotations"):
            load_model(out)
        return
    if case.modifiers == "REAPPruning":
        dense = load_model(folder)
        removed = record["experts_removed"]
        assert removed["kept"].keys() == removed["saliency"].keys()
        for layer, kept in removed["kept"].items():
            saliency = torch.tensor(removed["saliency"][layer])
            assert sorted(kept) == sorted(saliency.topk(len(kept)).indices.tolist())
            before, after = (m.get_submodule(layer).gate.weight for m in (dense, model))
            torch.testing.assert_close(after.float(), before[kept].float())
        assert len(removed["kept"]) == len(model.model.layers)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):  # AutoRound leaves those of its last layer in float32
            weight.data = weight.data.to(torch.bfloat16)
    ids = torch.arange(2, 40).unsqueeze(0)
    with torch.no_grad():
        loaded, memory = (m.eval()(input_ids=ids).logits for m in (load_model(out), model))
    torch.testing.assert_close(loaded, memory)


def table() -> str:
    """One row per run of cases with one outcome."""
    columns = ["modifiers", "schemes", "tokens that they read", "loads back", "vLLM on a CPU"]
    served = dict(json.loads(SERVED.read_text())["rows"])
    rows: dict[tuple[str, ...], list[str]] = {}
    for case in CASES:
        rows.setdefault(case.outcome(served), []).append(case.scheme)
    lines = [columns, ["---"] * len(columns)]
    lines += [[modifiers, "; ".join(of), *rest] for (modifiers, *rest), of in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_page_has_the_table():
    """If this fails: python -m tests.llmcompressor.test_matrix."""
    assert table() == PAGE.read_text().partition(MARKS[0])[2].partition(MARKS[1])[0]


def serve_all(vllm: Path) -> None:
    """Serve the checkpoint of each case, and write whether vLLM answers as transformers."""
    from bench.common import save
    from bench.schemes import served

    rows: list[list[str]] = json.loads(SERVED.read_text())["rows"] if SERVED.exists() else []
    with TemporaryDirectory() as folder:
        models = dense_models(Path(folder))
        for case in CASES:
            if case.refused or not case.loads or str(case) in dict(rows):
                continue
            dense, out = models[case.modifiers == "REAPPruning"], Path(folder) / str(len(rows))
            model = AutoModelForCausalLM.from_pretrained(dense)
            recipe = recipe_of(case, dense.with_suffix(".jsonl"))
            oneshot(model=model, recipe=recipe, output_dir=str(out))
            tokenizer = AutoTokenizer.from_pretrained(dense)
            rows.append([str(case), served(load_model(out), tokenizer, out, vllm)])
            print(*rows[-1], flush=True)
            columns = {"case": "", "served": ""}
            save(SERVED.parent, SERVED.stem, "tiny models", columns, rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve_all(Path(sys.argv[1]))
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(before + MARKS[0] + table() + MARKS[1] + rest.partition(MARKS[1])[2])
