"""The tiny model and its tokenizer."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="package")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.fixture(scope="package")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)
