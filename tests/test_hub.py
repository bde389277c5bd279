"""The hub's own client against a server on this machine: fetched, offline from the cache, uploaded; what is said if not."""

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

from wandapp import WandappError, load_model
from wandapp.card import base_model, model_card
from wandapp.config import PruneConfig
from wandapp.hub import check_push, download, missing_files, push

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories {name: {path: bytes}}; answers what huggingface_hub asks for downloads and uploads."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.fetched: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, body: bytes | dict | list, status: int = 200, **headers: str) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:2] == ["api", "whoami-v2"]:
            known = self.headers.get("Authorization") == "Bearer good"
            return self.answer({"name": "tester", "type": "user", "orgs": []}, 200 if known else 401)
        repo = "/".join(path[2:4] if path[0] == "api" else path[:2])
        files = self.server.repositories.get(repo)
        if files is None:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if path[0] == "api" and path[4:5] == ["tree"]:
            return self.answer([{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in files.items()])
        if path[0] == "api":
            return self.answer({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        name = "/".join(path[4:])
        if name not in files:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        if self.command == "GET":
            self.server.fetched.append(name)
        self.answer(files[name], X_Repo_Commit=COMMIT, ETag=f'"{hash(files[name]) & 0xFFFFFFFF:08x}"')

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:3] == ["api", "repos", "create"]:
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
            if not repo.startswith("tester/"):
                return self.answer({"error": "You don't have the rights to create a model there"}, 403)
            self.server.repositories.setdefault(repo, {})
            self.server.private[repo] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            return self.answer({"url": f"{self.server.address}/{repo}"})
        if path[:2] == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        if "preupload" in path:
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories["/".join(path[2:4])][line["value"]["path"]] = content
        address = f"{self.server.address}/{'/'.join(path[2:4])}/commit/{COMMIT}"
        self.answer({"success": True, "commitOid": COMMIT, "commitUrl": address})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server, with huggingface_hub pointed at it and an empty cache."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "good")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def checkpoint(pruned_checkpoint) -> Path:
    return pruned_checkpoint("llama", "2:4")[1]


@pytest.fixture
def published(hub, checkpoint):
    """The hub, with tester/tiny on it, and beside its weights what is not wanted."""
    files = {str(p.relative_to(checkpoint)): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
    hub.repositories["tester/tiny"] = files | {
        "pytorch_model.bin": b"pickle",
        "original/consolidated.00.pth": b"pickle",
    }
    return hub


def call(monkeypatch, capfd, *arguments):
    from wandapp import cli

    monkeypatch.setattr(sys, "argv", ["wandapp", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capfd.readouterr()


# Down


def test_a_hub_model_is_fetched_once_and_loads_offline(published, checkpoint, monkeypatch):
    model, tokenizer = load_model("tester/tiny")
    expected = load_model(checkpoint).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert tokenizer.name_or_path == "tester/tiny"
    assert "model.safetensors" in published.fetched and not any(".bin" in f or ".pth" in f for f in published.fetched)
    fetched = len(published.fetched)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_model("tester/tiny")
    assert len(published.fetched) == fetched


def test_offline_says_what_is_missing(published, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        WandappError, match="(?s)tester/tiny: .*HF_HUB_OFFLINE is set and the cache .* holds nothing of it"
    ):
        load_model("tester/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (download("tester/tiny") / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        WandappError, match=r"1 files are not in .*: model.safetensors \(HF_HUB_OFFLINE is set\); connect"
    ):
        load_model("tester/tiny")


def test_missing_files_are_those_the_index_names(tmp_path):
    (tmp_path / "model-1.safetensors").touch()
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert missing_files(tmp_path) == ["config.json", "model-2.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert missing_files(tmp_path)[-1].startswith("model.safetensors.index.json (this one is damaged)")


def test_no_address_and_no_repository(published, monkeypatch):
    with pytest.raises(WandappError, match="tester/none: neither a local folder nor a hub model that can be fetched"):
        load_model("tester/none")
    published.repositories["tester/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(WandappError, match="model.safetensors; the hub has no safetensors weights for it"):
        load_model("tester/pickled")
    monkeypatch.setattr(constants, "ENDPOINT", "http://nowhere.invalid")
    with pytest.raises(WandappError, match="no network: nowhere.invalid has no address here"):
        load_model("tester/tiny")


# Up


def test_prune_from_the_hub_and_push_back(published, tmp_path, monkeypatch, capfd):
    flags = ["--calibration", "pydoc", "--samples", "2", "--seq-len", "16", "--pack", "--json"]
    flags += ["--push-to-hub", "tester/pruned", "--private"]
    code, out, errors = call(monkeypatch, capfd, "prune", "tester/tiny", "--out", tmp_path / "out", *flags)
    assert code == 0, errors
    assert json.loads(out)["hub"] == f"{published.address}/tester/pruned" and published.private["tester/pruned"]
    uploaded = published.repositories["tester/pruned"]
    local = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert uploaded == local and "wandapp/recipe.yaml" in uploaded
    data = ModelCard(uploaded["README.md"].decode()).data.to_dict()
    assert data["base_model"] == "tester/tiny" and {"2:4", "wanda", "pruned"} <= set(data["tags"])
    assert data["calibration"].startswith("pydoc")
    assert load_model("tester/pruned").model is not None


def test_packed_checkpoint_is_pushed_by_the_command(published, checkpoint, tmp_path, monkeypatch, capfd):
    code, out, errors = call(
        monkeypatch, capfd, "pack", checkpoint, tmp_path / "packed", "--push-to-hub", "tester/packed", "--json"
    )
    assert code == 0, errors
    assert "wandapp/packed.json" in published.repositories["tester/packed"]
    assert call(monkeypatch, capfd, "push", tmp_path / "packed", "tester/again")[0] == 0
    assert published.repositories["tester/again"] == published.repositories["tester/packed"]
    assert (
        call(monkeypatch, capfd, "push", tmp_path, "tester/none")[0] == 2
        and "tester/none" not in published.repositories
    )


def test_what_cannot_be_pushed_is_said_before_the_work(hub, checkpoint, tmp_path, monkeypatch, capfd):
    code, _, errors = call(monkeypatch, capfd, "prune", checkpoint, "--out", tmp_path / "out", "--push-to-hub", "name")
    assert code == 2 and "a hub repository is OWNER/NAME" in errors and not (tmp_path / "out").exists()
    with pytest.raises(WandappError, match="strangers/x: cannot be uploaded"):
        push(checkpoint, "strangers/x")
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(WandappError, match="tester/x: cannot be uploaded .*; log in with: hf auth login"):
        check_push("tester/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WandappError, match="the hub cannot be reached .HF_HUB_OFFLINE is set."):
        check_push("tester/x")


# The card


def test_card_says_what_was_done_and_measured(tmp_path):
    recipe = PruneConfig(model="smollm2", method="wanda++", sparsity="4:8", out="x")
    figures = dict(text="a text", split="", seq_len=512, windows=4, dtype="float32", perplexity=12.5)
    recovered = dict(how="LoRA", tokens=100, text="c4", seconds=60.0, before={"a": figures | {"perplexity": 20.0}})
    recovered["after"] = {"a": figures}
    card = ModelCard(model_card(recipe, {}, recovered=recovered))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.eval_results[0].metric_value == 12.5
    assert "| a text | 512 | 4 | 20.00 | 12.50 |" in card.text
    assert "AutoModelForCausalLM.from_pretrained" in card.text and "100 tokens of c4 in 1.0 minutes" in card.text


@pytest.mark.parametrize(
    ("reference", "name"),
    [("owner/name", "owner/name"), ("/some/where", None), ("./owner/name", None), (None, None), ("model.gguf", None)],
)
def test_base_model_is_a_hub_name_or_nothing(reference, name):
    assert base_model(reference) == name
