"""Sends a load on a server from this process, and says where the process ran."""

import asyncio
import os
import platform
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata

from chai_jax.bench.load import Load, Measured, Sending
from chai_jax.bench.load_answers import Request
from chai_jax.bench.load_client import Server, check_listening, connected
from chai_jax.console import bar
from chai_jax.inputs.reading import Record

DESCRIPTORS = 2**16  # files that may be open at once: one a request in flight


def send(server: Server, load: Load, requests: Iterator[Request], warm: Iterator[Request]) -> tuple[Measured, bool]:
    """Send a load under a progress bar. Returns what was measured, and whether Ctrl-C or SIGTERM ended it early.

    Args:
        requests: endless; `warm`: those before the load.

    Raises:
        InputError: nobody listens there, or the first answer says that no other will be better.
        KeyboardInterrupt: it was ended before anything was measured.
    """
    _raise_limit_of_files()
    at_work: list[Sending] = []

    async def whole(tick: Callable[[Measured], object]) -> None:
        this = asyncio.current_task()
        if this is not None and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
        await check_listening(server.base)
        async with connected(server) as client:
            at_work.append(Sending(load, client, requests, warm, tick))
            await at_work[0].run()

    with bar() as progress:
        shown = progress.add_task("requests", total=load.requests, note="")

        def tick(measured: Measured) -> None:
            progress.update(shown, completed=measured.finished, note=f"{measured.in_flight} in flight")

        try:
            asyncio.run(whole(tick))
        except (KeyboardInterrupt, asyncio.CancelledError):
            if not (at_work and at_work[0].measured.answers):
                raise KeyboardInterrupt from None
            return at_work[0].measured, True
    return at_work[0].measured, False


def _raise_limit_of_files() -> None:
    """Let this process have as many connections as the system allows it: some shells allow 256 or 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def machine() -> Record:
    """Where the client ran. No device is touched: on this machine they may be the server's."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus_of_the_client": cpus,
        "load_average": os.getloadavg()[0],
        "python": ".".join(map(str, sys.version_info[:3])),
        "chai_jax": metadata.version("chai_jax"),
        "httpx2": metadata.version("httpx2"),
    }
