"""Tests run on eight virtual CPU devices, under strict dtype promotion, offline, apart from the user's caches.

CHAI_JAX_TEST_PLATFORM=cuda or tpu runs them there instead, which is for the kernels': tests/model/test_*_kernel.py.
CHAI_JAX_TEST_AS_USER=1 runs them as a user's machine would: on one CPU, with XLA's defaults and the kernels of CPUs.
Then select those that are for it: `-m as_user`.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

SETTINGS = {
    "JAX_PLATFORMS": os.environ.get("CHAI_JAX_TEST_PLATFORM", "cpu"),
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Compiling is most of the time of these tests, and optimised code would hardly run faster at such sizes.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1",
}
if version("jaxlib").startswith("0.10."):  # newer ones have no other emitter of loops, and stop at an unknown flag
    SETTINGS["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
AS_USER = os.environ.get("CHAI_JAX_TEST_AS_USER") == "1"
if AS_USER:
    del SETTINGS["JAX_NUM_CPU_DEVICES"], SETTINGS["XLA_FLAGS"]


def isolate() -> tempfile.TemporaryDirectory[str]:
    """Replace what the user set for JAX and Hugging Face; all caches go to a new folder, which is returned.

    The libraries read these variables when they are imported, and the programs that tests start inherit them.
    """
    folder = tempfile.TemporaryDirectory(prefix="chai_jax_tests_")
    for name in list(os.environ):
        if name.startswith(("JAX_", "XLA_", "HF_")):
            del os.environ[name]
    os.environ.update(SETTINGS, XDG_CACHE_HOME=folder.name, XDG_CONFIG_HOME=folder.name)
    return folder


# pytest-xdist starts its workers with the environment of the process that loaded this file first.
caches = None if "PYTEST_XDIST_WORKER" in os.environ else isolate()


def pytest_configure(config: pytest.Config) -> None:
    if caches is not None:
        config.add_cleanup(caches.cleanup)
        if AS_USER:  # the kernels are compiled once, before there are workers that would all begin to
            subprocess.run(
                [sys.executable, "-c", "from chai_jax.model.kernels import cpu; cpu.available()"], check=True
            )


@pytest.fixture(autouse=True, scope="session")
def kernels_for_small_matrices() -> Iterator[None]:
    """As a user, whose matrices are larger than those here: their products are the kernels'."""
    with pytest.MonkeyPatch.context() as patch:
        if AS_USER:
            from chai_jax.model.kernels import products_cpu

            for name in [name for name in vars(products_cpu) if name.endswith("LEAST")]:
                patch.setattr(products_cpu, name, 1)
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Compiled programs of one test file serve no other, and would add up to gigabytes."""
    yield
    import jax  # not before the environment is set

    jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data and weights that are too large for the repository."""
    folder = Path(os.environ.get("CHAI_JAX_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set CHAI_JAX_SHARED")
    return folder


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """PyTorch, the oracle; it is not a dependency."""
    module: ModuleType = pytest.importorskip("torch")
    return module


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random model of two layers and four heads with the toy's tokenizer."""
    import jax

    from chai_jax.data.toy import POSITIONS, toy_tokenizer
    from chai_jax.model.model import Model
    from chai_jax.model.params import OPTConfig, init
    from chai_jax.spec import Spec

    folder = tmp_path_factory.mktemp("small") / "model"
    tokenizer = toy_tokenizer()
    config = OPTConfig(-(-len(tokenizer) // 8) * 8, 32, 2, 4, 64, POSITIONS, 32)
    spec = Spec.dense(2, 4, 8)
    Model(config, spec, init(config, spec, jax.random.key(0), std=0.1), tokenizer, "small").save(folder)
    return folder
