"""A fake server, and engines on it."""

import pytest

from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.sampling.openai_server import ServerEngine
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from tests.sampling.fake_server import FakeServer, shorten_pauses
from tests.tiny import tiny_model, tiny_tokenizer

SAMPLING = SamplingSettings(temperature=1.0, max_new_tokens=20).resolved(None)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    shorten_pauses(monkeypatch)


@pytest.fixture
def server():
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=128)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def identity():
    return ModelIdentity.of_model(tiny_model())


@pytest.fixture
def make(server, identity, tokenizer):
    engines = []

    def make(*, urls=None, weights=None, **settings):
        settings = {"concurrency": 4, "verify_model": False, "timeout": 60, **settings}
        settings = EngineSettings(base_urls=urls or (server.url,), **settings)
        engines.append(ServerEngine(settings, identity, tokenizer, SAMPLING, weights))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
