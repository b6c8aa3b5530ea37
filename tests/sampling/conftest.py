import pytest

from tests.sampling.fake_server import FakeServer, shorten_pauses


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    shorten_pauses(monkeypatch)


@pytest.fixture
def server():
    server = FakeServer()
    yield server
    server.close()
