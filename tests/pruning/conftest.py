import pytest

from rac_modifier.pruning import narrow


@pytest.fixture(autouse=True)
def float32_products(monkeypatch):
    """What is compared with references is computed in float32 on every machine; test_narrow.py has the other products."""
    monkeypatch.setattr(narrow, "product_dtype", lambda device: None)
