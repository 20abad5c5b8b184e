"""The devices a command runs on: the processes that share the job, the backend asked for, mesh and dtype."""

import os
import sys
import urllib.request
from pathlib import Path

import jax

from chai_jax.config import DeviceConfig
from chai_jax.console import console
from chai_jax.errors import InputError
from chai_jax.files.atomic import check_writable
from chai_jax.inputs.paths import user_path
from chai_jax.machine.processes import first_process
from chai_jax.model.execution import Execution
from chai_jax.model.sharding import Layout, make_mesh


def start(config: DeviceConfig) -> Execution:
    """Join the other processes, check the backend; how models are to be run then.

    Of several processes only the first keeps talking. To be called once, before anything is computed.

    Raises:
        InputError: the processes cannot be joined, the backend is not the one required, the mesh does not fit, or
            compiled programs cannot be kept where they should be.
    """
    join_processes(config)
    if config.compile_cache is not None:
        folder = user_path(config.compile_cache.absolute())
        check_writable(folder, "--compile-cache")
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # By default programs that take less than a second are left out: most of a small model's.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    require_backend(config.require_backend)
    how = Execution.choose(config.dtype, Layout(make_mesh(*parse_mesh(config.mesh)), config.fsdp))
    if not first_process():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        console.quiet = True
    return how


def parse_mesh(mesh: str | None) -> tuple[int | None, int]:
    """(data, model) of `--mesh DATAxMODEL`; None where it is as large as the devices allow.

    Raises:
        InputError: it is not two numbers.
    """
    if mesh is None:
        return None, 1
    data, _, model = mesh.partition("x")
    if not (data.isdecimal() and model.isdecimal() and len(mesh) < 20):
        raise InputError(f"--mesh is {mesh!r}; expected DATAxMODEL, such as 8x1 or 4x2")
    return int(data), int(model)


def require_backend(wanted: str | None) -> None:
    """Raise InputError unless JAX computes on `wanted` (tpu, gpu or cpu): it falls back to the CPU all too quietly."""
    if wanted is None:
        return
    advice = f"expected a {wanted}: check that it is there, free, and that jax[tpu] or jax[cuda12] is installed"
    try:
        devices = jax.devices()
    except RuntimeError as error:  # JAX_PLATFORMS names a backend that does not start
        raise InputError(f"--require-backend is {wanted}; JAX found no devices ({error}); {advice}") from None
    found = jax.default_backend()
    if found != wanted:
        raise InputError(
            f"--require-backend is {wanted}; JAX found {len(devices)} x {devices[0].device_kind} ({found}); {advice}"
        )


def join_processes(config: DeviceConfig) -> None:
    """Call `jax.distributed.initialize` where there are several processes: asked for, or a TPU pod of several hosts.

    Raises:
        InputError: the coordinator cannot be reached, the processes cannot be found, or half of the flags are there.
    """
    named = [config.coordinator, config.process_count, config.process_id]
    if any(value is not None for value in named) and None in named:
        raise InputError("expected --coordinator HOST:PORT, --process-count and --process-id together, or none of them")
    coordinator = config.coordinator
    if coordinator is None:  # as JAX finds it
        coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None and not config.distributed and tpu_hosts() == 1:
        return
    # JAX's own handler of SIGTERM would take the place of ours (chai_jax.stopping), and knows of no deadline.
    jax.config.update("jax_enable_preemption_service", False)
    _check_place(coordinator, config.process_count, config.process_id)
    try:
        jax.distributed.initialize(config.coordinator, config.process_count, config.process_id)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"cannot join the other processes ({error}); expected --coordinator HOST:PORT, --process-count and "
            "--process-id, or a cluster that JAX knows (TPU pod, SLURM, MPI)"
        ) from None


def _check_place(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Refuse what `jax.distributed` would wait for in vain."""
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not (host and host.isprintable() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 2**16):
            raise InputError(f"the coordinator is {coordinator!r}; expected HOST:PORT, such as 10.0.0.1:1234")
    if count is not None and index is not None and not 0 <= index < count < 2**31:
        raise InputError(f"--process-id is {index} of {count}; expected a number from 0, below --process-count")


def tpu_hosts() -> int:
    """How many hosts share this machine's TPU: 1 where there is none.

    Read from the environment (GKE, Kaggle) or the metadata server (TPU VMs), as JAX does. JAX cannot be asked: once it
    has looked at its devices, it can join nobody. And `jax.distributed.initialize()` raises the same ValueError where
    there is no cluster and where one cannot be made out; a pod's host must not go on alone for that.
    """
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if hosts is None and (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()):
        server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
        url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
        try:
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            with urllib.request.urlopen(request, timeout=10) as answer:
                hosts = answer.read().decode()
        except OSError:  # no TPU VM, but a machine with such devices
            hosts = None
    return len(hosts.split(",")) if hosts else 1
