import pytest
import torch

from rac_modifier.pruning.statistics import GroupStatistics


@pytest.mark.parametrize("rows", [(3,), (2, 4), (40, 8)])  # summed after W where few rows leave, before it elsewhere
def test_drift_is_the_correlation_of_output_and_input(rows):
    torch.manual_seed(0)
    weights = [torch.randn(r, 16) for r in rows]
    statistics = GroupStatistics(weights, 16, torch.device("cpu"), drift=True)
    batches = [(torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.rand(2, 5)) for _ in range(3)]
    batches[1][2][0, 3:] = 0.0
    batches[1][0][0, 3:] = float("nan")  # padding may hold anything
    for x, dense, w in batches:
        statistics.add(x, w, dense)
    total = sum(float(w.sum()) for *_, w in batches)
    for weight, drift in zip(weights, statistics.drift(), strict=True):
        expected = torch.zeros(weight.shape, dtype=torch.float64)
        for x, dense, w in batches:
            kept = w > 0
            x, dense, w = x[kept].double(), dense[kept].double(), w[kept].double()
            expected += weight.double() @ ((dense - x) * w.unsqueeze(1)).T @ x
        torch.testing.assert_close(drift, (expected * 2 / total).float(), rtol=1e-4, atol=1e-5)


def test_without_the_dense_model_there_is_no_drift():
    statistics = GroupStatistics([torch.ones(2, 4)], 4, torch.device("cpu"), drift=False)
    statistics.add(torch.randn(1, 3, 4), torch.ones(1, 3))
    assert statistics.drift() is None
