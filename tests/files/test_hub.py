"""A hub id becomes a folder: against a hub of our own on this machine, then without it."""

import json
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from chai_jax.errors import InputError
from chai_jax.files.hub import cached, needed, resolve
from chai_jax.files.store import load

REPO = "someone/small-opt"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = ["config.json", "vocab.json", "merges.txt", "README.md", "LICENSE.md"]


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        (["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"], ["model.safetensors"]),
        (["flax_model.msgpack", "pytorch_model.bin", "tf_model.h5"], ["flax_model.msgpack"]),
        (["pytorch_model.bin", "tf_model.h5"], ["pytorch_model.bin"]),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], ["model-*.safetensors"]),
        (["flax_model.msgpack.index.json", "pytorch_model.bin"], ["flax_model-*.msgpack"]),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], ["pytorch_model-*.bin"]),
        ([], []),
    ],
)
def test_weights_are_fetched_in_one_format(there: list[str], fetched: list[str]) -> None:
    patterns = needed([*SMALL, *there])
    assert patterns[len(patterns) - len(fetched) :] == fetched
    assert patterns[: len(patterns) - len(fetched)] == needed(SMALL)


def test_what_decides_texts_is_fetched() -> None:
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "chat_templates/rag.jinja"):
        assert any(fnmatch(name, pattern) for pattern in needed([])), name


class Hub(ThreadingHTTPServer):
    """The few addresses of the Hugging Face hub that a download uses, over one folder's files."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.sent: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = self.server.files
        file = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if path in (f"/api/models/{REPO}", *(f"/api/models/{REPO}/revision/{name}" for name in ("main", COMMIT))):
            self.answer(json.dumps({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}))
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(x), "oid": f"{name:0>40}"} for name, x in files.items()
            ]
            self.answer(json.dumps(entries))
        elif file in files:
            if self.command == "GET":
                self.server.sent.append(file)
            self.answer(files[file], {"ETag": f'"{file:0>40}"', "X-Repo-Commit": COMMIT})
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self.answer(b"", {"X-Error-Code": "RevisionNotFound"}, 404)
        elif "gated" in path:
            self.answer(b"", {"X-Error-Code": "GatedRepo"}, 403)
        else:
            self.answer(b"", {"X-Error-Code": "RepoNotFound"}, 404)

    def answer(self, content: str | bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        body = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(
    tmp_path: Path, fields: dict[str, Any], random_arrays: Any, write: Any, write_tokenizer: Any, monkeypatch: Any
) -> Iterator[Hub]:
    """A hub that holds one model, in two formats, with all that is around it."""
    fields["vocab_size"] = 300
    folder = write(fields, random_arrays(fields))
    write_tokenizer(folder)
    for name in ("LICENSE.md", "README.md", "pytorch_model.bin", "tf_model.h5", "script.py"):
        (folder / name).write_text("---\nlicense: mit\n---\n")
    server = Hub(folder)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_only_what_is_needed_is_fetched_and_serves_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cached(REPO) is None
    model = load(REPO)
    assert (model.source, len(model.tokenizer)) == (REPO, 260)
    wanted = {*SMALL, "tokenizer_config.json", "model.safetensors"}
    assert set(hub.sent) == wanted
    assert len(hub.sent) == len(wanted)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = load(REPO)
    np.testing.assert_array_equal(again.params["embed"]["tokens"], model.params["embed"]["tokens"])
    assert cached(REPO) == resolve(REPO)
    assert len(hub.sent) == len(wanted)


def test_revisions(hub: Hub) -> None:
    assert resolve(REPO, COMMIT).name == COMMIT
    with pytest.raises(InputError, match=rf"^{REPO} has no revision 'v2' on the hub"):
        resolve(REPO, "v2")


def test_what_the_hub_does_not_have(hub: Hub) -> None:
    with pytest.raises(InputError, match=r"^there is no folder someone/else here, and on the hub no public model"):
        resolve("someone/else")
    with pytest.raises(
        InputError, match=r"^someone/gated is gated on the hub; accept its terms there and set HF_TOKEN"
    ):
        resolve("someone/gated")


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        InputError, match=r"not in Hugging Face's cache, and the hub cannot be reached \(.+\); give a folder"
    ):
        load(REPO)


def test_offline() -> None:
    with pytest.raises(InputError, match=r"the hub cannot be reached \(.*offline mode is enabled.*\)") as caught:
        load(REPO)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["/no/such/folder", "./opt", "a/b/c", "~/opt", "a--b", "a b", Path("someone/opt")])
def test_what_can_only_be_a_folder(source: str | Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*; expected a model folder or a hub id such as"):
        resolve(source)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"is a file; .* give the folder it is in"):
        resolve(tmp_path / "model.safetensors")


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match="is a folder, which has no revision 'main'"):
        resolve(tmp_path, "main")
