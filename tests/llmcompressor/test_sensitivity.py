import pytest
import torch
import torch.nn.functional as F

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.calibration.mixture import CalibrationSequence, compose
from rac_modifier.llmcompressor.sensitivity import measure_sensitivity
from rac_modifier.settings.calibration import CalibrationSettings
from tests.tiny import linears, tiny_model


def loader(lengths: list[int]) -> CalibrationLoader:
    generator = torch.Generator().manual_seed(3)
    sequences = [
        CalibrationSequence(tuple(torch.randint(2, 300, (n,), generator=generator).tolist()), 0, "traces")
        for n in lengths
    ]
    return CalibrationLoader(sequences, compose(sequences), CalibrationSettings(batch_tokens=256), 0)


def test_it_measures_the_kl_of_one_module_pruned_alone():
    model, calibration = tiny_model(), loader([40, 30, 20])
    names = {module: name for name, module in linears(model).items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_sensitivity(model, calibration, names, 0.7)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert found.keys() == set(names.values())

    # by hand for one module: all 90 tokens are fewer than 512, so every position counts
    name = "model.layers.1.mlp.up_proj"
    module, inputs = model.get_submodule(name), []
    hook = module.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    rows = [torch.tensor([sequence.ids]) for sequence in calibration.sequences]
    with torch.no_grad():
        dense = torch.cat([model(input_ids=ids).logits[0] for ids in rows])
        hook.remove()
        squares = torch.cat([x[0] for x in inputs]).square().sum(0)
        scores = module.weight.square() * squares
        mask = scores <= scores.flatten().kthvalue(int(scores.numel() * 0.7)).values
        module.weight.data.masked_fill_(mask, 0.0)
        pruned = torch.cat([model(input_ids=ids).logits[0] for ids in rows])
    kl = F.kl_div(pruned.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="sum") / 90
    assert found[name].kl == pytest.approx(float(kl), rel=1e-3)
    assert found[name].lost == pytest.approx(float(scores[mask].sum()), rel=1e-3)
    assert found[name].weights == module.weight.numel()
    assert list(found[name].thresholds) == sorted(found[name].thresholds)


def test_it_takes_no_more_tokens_than_it_says():
    model, seen = tiny_model(), []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    names = {model.get_submodule("model.layers.0.mlp.down_proj"): "down"}
    measure_sensitivity(model, loader([100] * 60), names, 0.5)
    hook.remove()
    assert sum(seen) == 2 * 2100  # the dense pass and one more, up to the row that completes 2,048
