"""A real server on a real socket, in a thread, before an engine without a model."""

import importlib.util
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_engine", HERE / "fake.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_engine"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def start(fake: ModuleType) -> Iterator[Callable[..., Any]]:
    """`start(engine, **settings)`: a server with `port`, `engine`, `address`; all of a file end with it."""
    for name in ("uvicorn", "starlette", "prometheus_client"):
        pytest.importorskip(name)
    from chai_jax.server import run
    from chai_jax.server.settings import ServerSettings

    servers = []

    def begin(engine: Any = None, **settings: Any) -> Any:
        engine = fake.FakeEngine() if engine is None else engine
        told = ServerSettings(**{"name": "fake", "port": 0, "grace": 0.5, **settings})
        app = run.make_app(engine, told)
        listening = run.listen(told.host, told.port)
        options = run.settings_of_uvicorn(app, told.host, told.connections, 5)
        server = run._Server(run.uvicorn.Config(**options), engine, told, app.state.desk)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.005)
        servers.append((server, thread))
        port = listening.getsockname()[1]
        return SimpleNamespace(engine=engine, port=port, address=f"http://127.0.0.1:{port}", desk=app.state.desk)

    yield begin
    for server, thread in servers:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def speak() -> Callable[..., bytes]:
    """`speak(port, data)`: what the server answers to these bytes until it closes, or says nothing for a second."""

    def send(port: int, data: bytes, wait: float = 1.0) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=wait) as line:
            found = b""
            try:
                line.sendall(data)
                while piece := line.recv(65536):
                    found += piece
            except (TimeoutError, ConnectionError):
                pass
            return found

    return send
