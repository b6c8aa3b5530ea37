import pytest


@pytest.fixture(autouse=True)
def references_are_float32(float32_products):
    """All of these tests compare with one."""
