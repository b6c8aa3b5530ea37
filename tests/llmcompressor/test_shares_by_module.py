import json

import pytest

import rac_modifier
from rac_modifier import RacError
from tests.tiny import linears


def zeros(model) -> dict[str, int]:
    return {name: int((module.weight == 0).sum()) for name, module in linears(model).items()}


def total(model) -> int:
    return sum(module.weight.numel() for module in linears(model).values())


def test_the_average_is_exact_and_each_module_has_its_own(prune, tmp_path):
    model = prune(
        mask_structure="0:0",
        sparsity=0.6,
        allocation={"re:.*down_proj": 0.3, "model.layers.0.mlp.down_proj": 0.5},
        reconstruct="pruned",
        output_dir=tmp_path / "out",
    )
    assert sum(zeros(model).values()) == int(total(model) * 0.6)
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    shares = {module["name"]: module["sparsity"] for module in record["modules"]}
    assert len(set(shares.values())) > 2
    for name, module in linears(model).items():
        assert shares[name] == pytest.approx(zeros(model)[name] / module.weight.numel())
    assert shares["model.layers.0.mlp.down_proj"] == pytest.approx(0.5, abs=1e-3)
    assert shares["model.layers.1.mlp.down_proj"] == pytest.approx(0.3, abs=1e-3)
    assert "more in some modules than in others" in record["pattern"]
    assert zeros(rac_modifier.load_model(tmp_path / "out")) == zeros(model)


@pytest.mark.parametrize("solver", ["sparsegpt", "wanda", "magnitude"])
def test_every_solver_prunes_each_module_by_its_share(prune, solver):
    model = prune(
        mask_structure="0:0",
        sparsity=0.5,
        solver=solver,
        reconstruct="pruned",
        allocation={"re:.*q_proj": 0.8, "re:.*k_proj": 0.2},
    )
    counts = zeros(model)
    for name, module in linears(model).items():
        wanted = 0.8 if "q_proj" in name else 0.2 if "k_proj" in name else None
        if wanted:
            assert counts[name] / module.weight.numel() == pytest.approx(wanted, abs=0.02)
    assert sum(counts.values()) == pytest.approx(total(model) * 0.5, abs=14 * 64)


def test_a_module_that_lost_its_own_pattern_is_refused_at_save(prune, tmp_path):
    model = prune(
        mask_structure="0:0", sparsity=0.5, allocation={"model.layers.0.mlp.up_proj": 0.9}
    )
    module = model.model.layers[0].mlp.up_proj
    module.weight.data[:32] = 1.0  # half of it: enough zeros are left for 50 %, not for its 90 %
    with pytest.raises(RacError, match=r"layers\.0\.mlp\.up_proj .*90 %"):
        model.save_pretrained(tmp_path / "out")
