"""`experiments/serve_peers.py`: servers started in turn, asked the same, and ended with all that they started."""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chai_jax.errors import InputError

ROOT = Path(__file__).parents[1]
SERVER = f"""
import asyncio, os, subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.bench.scripted_server import ScriptedServer

async def script(asked):
    with open(sys.argv[2] + ".asked", "a") as file:
        file.write(asked.body["prompt"] + chr(10))
    await asked.say(2, 3)

child = subprocess.Popen(["sleep", "600"])
with open(sys.argv[2] + ".processes", "a") as file:
    file.write(f"{{os.getpid()}} {{child.pid}} ")
server = ScriptedServer(script)
server.port = int(sys.argv[1])
print("here I am", flush=True)
with server:
    server._thread.join()
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return importlib.import_module("serve_peers")


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(") ")[-1][0] != "Z"


def options(peers: ModuleType, out: Path, *servers: str, **more: Any) -> Any:
    few = {"at_once": "1,2", "requests": 2, "rounds": 2, "patience": 30.0, "prompt_tokens": "4", "new_tokens": "3"}
    return peers.PeersOptions(("a/model",), seeds="0", out=out, servers=servers, **{**few, **more})


def test_servers_have_their_turns(peers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    start = f"{sys.executable} {tmp_path}/server.py {{port}} {tmp_path}/"
    told = peers.experiment(options(peers, tmp_path / "out", f"one={start}one", f"two@{{model}}={start}two"))
    whole = json.loads((tmp_path / "out/serve_peers.json").read_text())
    rows = {(row["server"], row["load"]): row for row in whole["rows"]}
    assert list(rows) == [(name, f"{size} at once") for name in ("one", "two") for size in (1, 2)]
    assert told["rows"] == 4
    for (_, load), row in rows.items():
        size = int(load.split()[0])
        assert (row["sent"], row["answered"], row["new_tokens"], row["rounds"]) == (4 * size, 4 * size, 12 * size, 2)
        rate = row["new_tokens_per_second"]
        assert 0 < rate["least"] <= rate["median"] <= rate["largest"]
    order = [(one["round"], one["server"]) for one in whole["turns"] if one["load"] == "1 at once"]
    assert order == [(0, "one"), (0, "two"), (1, "two"), (1, "one")]
    asked = {name: (tmp_path / f"{name}.asked").read_text().split("\n") for name in ("one", "two")}
    assert sorted(asked["one"]) == sorted(asked["two"])
    assert len(set(asked["one"]) - {"", "Once"}) == 1 + 2 + 2 + 4  # not counted ones too; each round the same
    processes = [int(word) for name in ("one", "two") for word in (tmp_path / f"{name}.processes").read_text().split()]
    assert len(processes) == 8
    until = time.monotonic() + 10
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [process for process in processes if alive(process)]
    assert str(tmp_path) not in (tmp_path / "out/serve_peers.md").read_text()


def test_requests_may_come_at_a_rate(peers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    one = f"one={sys.executable} {tmp_path}/server.py {{port}} {tmp_path}/one"
    peers.experiment(options(peers, tmp_path / "out", one, rates="40", requests=6, rounds=1))
    (row,) = json.loads((tmp_path / "out/serve_peers.json").read_text())["rows"]
    assert (row["load"], row["sent"], row["answered"]) == ("40 a second", 6, 6)


BAD = {
    "ended with status 3; expected a server: see serve_peers_x.log, which ends: no such model": (
        'x=sh -c "echo no such model; exit 3; {port}"'
    ),
    "gave no answer in 0.5 s": "x=sleep 60 {port}",
    "cannot be started": "x=there-is-no-such-program {port}",
    "expected NAME=COMMAND": "chai-jax serve {port}",
    "in it, or NAME@MODEL": "x=chai-jax serve",
}


@pytest.mark.parametrize("message", BAD)
def test_servers_that_do_not_come(message: str, peers: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        peers.experiment(options(peers, tmp_path / "out", BAD[message], patience=0.5 if "0.5" in message else 20.0))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "more",
    [
        {"at_once": "0"},
        {"at_once": "1,"},
        {"rounds": 0},
        {"rates": "0"},
        {"rates": "1,x"},
        {"extra": "3"},
        {"requests": 0},
    ],
)
def test_options_that_cannot_be(more: Any, peers: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(more)).replace('_', '-')}"):
        peers.experiment(options(peers, tmp_path / "out", "x=sleep {port}", **more))
    assert os.listdir(tmp_path) == []


def test_names_of_models(peers: ModuleType) -> None:
    peer = peers.Peer.read("a@{model}/x=serve '{model}' --port {port} --key=1", "my model")
    assert (peer.name, peer.model) == ("a", "my model/x")
    assert peers.Peer.read("b=serve {model} {port}", "my model").command == "serve 'my model' {port}"
