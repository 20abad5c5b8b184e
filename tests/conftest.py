"""Tests run on eight virtual CPU devices, under strict dtype promotion, offline, apart from the user's caches.

CHAI_JAX_TEST_PLATFORM=cuda or tpu runs them there instead, which is for the kernels': tests/model/test_*_kernel.py.
CHAI_JAX_TEST_AS_USER=1 runs them as a user's machine would: on one CPU, with XLA's defaults and the kernels of CPUs.
Then select those that are for it: `-m as_user`.
"""

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

SETTINGS = {
    "JAX_PLATFORMS": os.environ.get("CHAI_JAX_TEST_PLATFORM", "cpu"),
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Of several workers each; waiting for one another, threads of BLAS take twenty times as long for small matrices.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`as_user(alone=True)`: not on eight devices too."""
    marked = {item: item.get_closest_marker("as_user") for item in items}
    apart = [item for item, mark in marked.items() if mark is not None and mark.kwargs.get("alone") and not AS_USER]
    if apart:
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if item not in apart]


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


FILES = itertools.count(1)  # that this worker is done with


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Compiled programs would add up to gigabytes; but the small ones serve the next files too."""
    yield
    if next(FILES) % 4 == 0:
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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Chromium, where there is one (tests/browser.py); one for each file, since it notes what it was asked for."""
    spec = importlib.util.spec_from_file_location("browser", ROOT / "tests" / "browser.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [path for path in map(shutil.which, module.NAMES) if path]
    if not found:
        pytest.skip("no Chromium on the PATH: install chromium to open the page in a real browser")
    opened = module.Browser(found[0], tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def kill() -> ModuleType:
    """experiments/kill.py, which compares run folders."""
    spec = importlib.util.spec_from_file_location("kill", ROOT / "experiments" / "kill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def layers_seen() -> Callable[..., list[Any]]:
    """`layers_seen(config, spec, params, tokens, mask, how)`: what each layer's attention did, `Seen` by layer."""
    import jax

    from chai_jax.model.decoder import embed
    from chai_jax.model.execution import Execution
    from chai_jax.model.layerwise import seen_through
    from chai_jax.model.place import locate

    def look(config: Any, spec: Any, params: Any, tokens: Any, mask: Any, how: Any = None) -> list[Any]:
        how = how or Execution.choose("float32")

        def run(params: Any, tokens: Any, mask: Any) -> list[Any]:
            x, found = embed(config, params, tokens, locate(mask).positions, how), []
            for index, layer in enumerate(spec.layers):
                x, seen = seen_through(config, layer, how, params["layers"][str(index)], x, mask)
                found.append(seen)
            return found

        return jax.jit(run)(params, tokens, mask)

    return look


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random model of two layers and four heads with the toy's tokenizer."""
    import jax

    from chai_jax.data.toy import POSITIONS, toy_tokenizer
    from chai_jax.files.store import save
    from chai_jax.model.model import Model
    from chai_jax.model.params import init
    from chai_jax.plans.architecture import Architecture
    from chai_jax.plans.spec import Spec

    folder = tmp_path_factory.mktemp("small") / "model"
    tokenizer = toy_tokenizer()
    config = Architecture(-(-len(tokenizer) // 8) * 8, 32, 2, 4, 64, POSITIONS, 32)
    spec = Spec.dense(2, 4, 8)
    save(Model(config, spec, init(config, spec, jax.random.key(0), std=0.1), tokenizer, "small"), folder)
    return folder


@pytest.fixture(scope="session")
def tiny(torch: ModuleType, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OPT of two layers and 128 positions with opt-mini's tokenizer, saved by transformers."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    config = OPTConfig(**sizes, num_attention_heads=4, vocab_size=8192, max_position_embeddings=128, init_std=0.2)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    OPTForCausalLM(config).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(shared / "models/opt-mini" / name, folder)
    return folder


@pytest.fixture
def altered(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of `tiny` with other files: `altered(generation_config={...})` writes generation_config.json anew, None
    removes it; `config` and `tokenizer_config` change fields."""

    def copy(**files: dict[str, Any] | None) -> Path:
        folder = tmp_path / f"tiny{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny, folder)
        for name, fields in files.items():
            path = folder / f"{name}.json"
            if fields is None:
                path.unlink()
            else:
                before = {} if name == "generation_config" else json.loads(path.read_text())
                path.write_text(json.dumps(before | fields))
        return folder

    return copy


@pytest.fixture
def without_special_tokens(altered: Callable[..., Path]) -> Path:
    """A copy of `tiny` whose tokenizer, as Galactica's, names no special token and puts nothing before a text."""
    from transformers import AutoTokenizer

    folder = altered()
    whole = json.loads(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(whole | {"post_processor": None}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    return folder
