"""Uploads to a stand-in of the hub on this machine, up to what it receives."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, ModelCardData, constants
from transformers import PreTrainedModel

from rac_modifier.checkpoint.load import load_model
from rac_modifier.checkpoint.saving import SavePlan, save_with_record
from rac_modifier.checkpoint.upload import upload
from rac_modifier.settings.pattern import Pattern
from tests.checkpoint.checkpoint_helpers import (
    Saved,
    assert_same_state,
    config_of,
    contents,
    prune_24,
    tiny_model,
)
from tests.tiny import linears


class FakeHub:
    """Repositories and their files, as the hub's HTTP interface makes them; files of all kinds by Git LFS's protocol."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict] = []
        self.commits: list[dict] = []
        self.objects: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None: ...

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts = []
                    while size := int(self.rfile.readline(), 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def answer(self, content: object, status: int = 200) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                found = re.match(r"/api/models/([^/]+/[^/?]+)", self.path)
                if found is None or found[1] not in hub.repositories:
                    return self.answer({"error": "Repository not found"}, 404)
                self.answer({"id": found[1], "siblings": [], "sha": "0" * 40, "tags": []})

            def do_HEAD(self) -> None:
                self.answer({}, 404)

            def do_POST(self) -> None:
                body = self.body()
                self.answer(
                    hub.post(self.path.partition("?")[0], body, f"http://{self.headers['Host']}")
                )

            def do_PUT(self) -> None:
                hub.objects[self.path.rpartition("/")[2]] = self.body()
                self.answer({})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def post(self, path: str, body: bytes, url: str) -> object:
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.created.append(wanted)
            name = (
                wanted["name"]
                if "/" in wanted["name"]
                else f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            )
            self.repositories.setdefault(name, {})
            return {"url": f"{url}/{name}"}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return {
                "files": [
                    {"path": f["path"], "uploadMode": "lfs", "shouldIgnore": False} for f in files
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = {o["oid"]: {"upload": {"href": f"{url}/lfs/{o['oid']}"}} for o in objects}
            return {
                "transfer": "basic",
                "objects": [{**o, "actions": actions[o["oid"]]} for o in objects],
            }
        if found := re.fullmatch(r"/api/models/(.+/.+)/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                value = line["value"]
                if line["key"] == "lfsFile":
                    self.repositories[found[1]][value["path"]] = self.objects[value["oid"]]
                elif line["key"] == "file":
                    self.repositories[found[1]][value["path"]] = base64.b64decode(value["content"])
                else:
                    self.commits.append(value)
            return {
                "commitUrl": f"{url}/{found[1]}/commit/{'1' * 40}",
                "commitOid": "1" * 40,
                "success": True,
            }
        return {"errors": [], "warnings": []}  # the check of a card's front matter


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """What HF_ENDPOINT and HF_TOKEN set in a process that starts with them."""
    fake = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    for proxy in (
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(proxy, raising=False)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def pruned() -> PreTrainedModel:
    model = tiny_model()
    modules = linears(model)
    for linear in modules.values():
        prune_24(linear.weight.data)
    made = SavePlan({"method": "alps"}, dict.fromkeys(modules, Pattern.n_of_m(2, 4)), modules)
    model.config._name_or_path = "owner/base"
    save_with_record(model, lambda: made)
    return model


def received(hub: FakeHub, name: str, folder: Path) -> Path:
    """What the hub has, as a folder."""
    folder.mkdir()
    for path, content in hub.repositories[name].items():
        (folder / path).write_bytes(content)
    return folder


def test_a_packed_folder_arrives_as_it_is(hub: FakeHub, saved: Saved, tmp_path: Path) -> None:
    folder, expected, _ = saved()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    upload(folder, "me/packed", private=True, commit_message="First", token="hf_test")
    assert hub.repositories["me/packed"] == contents(folder)
    made = hub.created[0]
    assert made.get("private") is True or made.get("visibility") == "private"
    assert hub.commits[0]["summary"] == "First"
    assert_same_state(load_model(received(hub, "me/packed", tmp_path / "again")), expected)


def test_huggingface_hubs_own_upload_works_too(hub: FakeHub, saved: Saved) -> None:
    """`hf upload me/packed FOLDER`."""
    folder, _, _ = saved()
    api = HfApi(endpoint=hub.url, token="hf_test")
    api.create_repo("me/packed")
    api.upload_folder(repo_id="me/packed", folder_path=folder)
    assert hub.repositories["me/packed"] == contents(folder)


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_a_pruned_model_is_pushed_packed_with_its_card(
    hub: FakeHub, tmp_path: Path, way: str
) -> None:
    model = pruned()
    if way == "push_to_hub":
        model.push_to_hub("me/sparse", tags=["mine"], commit_message="Sparse")
    else:
        options = {"tags": ["mine"], "commit_message": "Sparse"}
        model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/sparse", **options)
        assert contents(tmp_path / "out") == hub.repositories["me/sparse"]
    again = received(hub, "me/sparse", tmp_path / "again")
    assert (
        config_of(again)["quantization_config"]["sparsity_config"]["format"] == "sparse-24-bitmask"
    )
    assert_same_state(load_model(again), model.state_dict())
    card = ModelCard.load(again / "README.md")
    assert isinstance(card.data, ModelCardData)
    assert (card.data.base_model, card.data.license) == ("owner/base", "unknown")
    assert {"mine", "sparse"} <= set(card.data.tags)
    assert "| Solver | alps |" in card.content
    assert hub.commits[0]["summary"] == "Sparse"
    assert json.loads((again / "rac_run.json").read_text())["base_model"] == "owner/base"
