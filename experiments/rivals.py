"""Other programs' and other papers' caches of few bits, beside ours, on the same windows.

    python experiments/rivals.py $MODEL --text wiki.test.raw --gguf model-f16.gguf --seeds 0 --out runs/rivals

Windows, figures and columns are those of `few_bits.py`: KL divergence of the next-token distribution and change of
perplexity over the first --windows windows of the text, with 95 % intervals over windows; bytes of a further token and
of a whole window as fractions of the dense bfloat16 cache. Each is compared with the dense cache *of its own program*:
ours with bfloat16, transformers' with its own of float32, llama.cpp's with float16; `dense perplexity` shows that they
are the same model. Groups, any of which may be left out by --rivals:

- ours: the formats of --storages, no plan and no calibration;
- transformers: `QuantizedCache` with its backends quanto, HQQ and fp8 (needs optimum-quanto and hqq);
- kivi-turboquant: the settings of KIVI and TurboQuant in code of ours (`lab/settings_of_others.py`), not the authors';
- llama.cpp: its cache types, on a GGUF file of the same weights (--gguf; needs llama-cpp-python).

What a token reads of each is said in `lab/quantized_caches.py`, `lab/settings_of_others.py` and `lab/llama_cpp.py`. In
all of them the rows of a window read what decoding would. A window takes minutes, so what was measured of each is kept
in OUT/rows and read back by the next call, which may ask for more windows. Expected: at equal bytes ours do less damage
than all others. Writes rivals.json, .csv and .md.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chai_jax.compress.quantize import with_storage
from chai_jax.console import console, track
from chai_jax.errors import InputError
from chai_jax.files.store import load
from chai_jax.model.cache import empty
from chai_jax.model.model import Model
from chai_jax.report.tables import Column
from chai_jax.run.options import parse_list
from lab import damage, llama_cpp, quantized_caches, settings_of_others
from lab.kept import kept
from lab.options import Common, Record, start
from lab.publish import publish

GROUPS = {  # and what each imports
    "ours": (),
    "transformers": ("torch", "optimum.quanto", "hqq"),
    "kivi-turboquant": ("torch",),
    "llama.cpp": ("llama_cpp",),
}
COLUMNS: tuple[Column, ...] = (
    *damage.COLUMNS,
    ("dense perplexity", lambda row: f"{row['dense_perplexity']:.3f}"),
    ("windows", lambda row: str(row["n"])),
)
Reader = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class RivalsOptions(Common):
    text: Path | None = None
    """What damage is measured on: a text file, plain or .gz."""
    gguf: Path | None = None
    """MODEL's weights for llama.cpp, in 16 or 32 bits: its convert_hf_to_gguf.py makes such a file."""
    rivals: str = ",".join(GROUPS)
    """Groups of rows, with commas."""
    storages: str = "int8,int4,k4v4,k4v3,k3v3,k3v2,k2v2"
    """Formats of ours, with commas."""
    windows: int = 16
    window: int = 512
    """Tokens of a window."""

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups, all of whose packages are here.

        Raises:
            InputError: no such group; a package is missing.
        """
        named = parse_list("--rivals", self.rivals, tuple(GROUPS))
        for group in named:
            missing = [package for package in GROUPS[group] if not installed(package)]
            if missing:
                raise InputError(
                    f"{', '.join(missing)} cannot be imported; expected what rows of {group} need: install "
                    f"it, or leave {group} out of --rivals"
                )
        if "llama.cpp" in named and self.gguf is None:
            raise InputError("rows of llama.cpp need --gguf FILE; expected one of MODEL's weights, or other --rivals")
        return named


def installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is a part of
        return False


@dataclass(frozen=True)
class Cache:
    """A row to be: `sizes` are its bytes of a token and of a window, as fractions."""

    name: str
    reader: Reader
    sizes: Record


class Caches:
    """The rows of one model, by group: its dense reader, readers by name, and sizes by name."""

    def __init__(self, source: str, model: Model, options: RivalsOptions):
        self.source, self.model, self.options = source, model, options
        self.window = options.window

    @cached_property
    def torch(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32).eval()

    def plain(self, tokens: np.ndarray) -> np.ndarray:
        """torch's own logits."""
        import torch

        with torch.no_grad():
            logits: np.ndarray = self.torch(torch.as_tensor(tokens).long(), use_cache=False).logits.numpy()
        return logits

    def of(self, group: str) -> tuple[Reader, list[Cache]]:
        """A group's dense reader, and its rows."""
        if group == "ours":
            return self.model, [self.ours(name) for name in self.options.storages.split(",") if name]
        if group == "transformers":
            config = self.torch.config
            return self.plain, [
                Cache(
                    one.name, quantized_caches.reader(self.torch, one), quantized_caches.sizes(config, one, self.window)
                )
                for one in quantized_caches.settings()
            ]
        if group == "kivi-turboquant":
            head_dim = self.model.config.head_dim
            return self.plain, [
                Cache(one.name, settings_of_others.reader(self.torch, one), one.sizes(head_dim, self.window))
                for one in settings_of_others.settings()
            ]
        return self.llama()

    def ours(self, storage: str) -> Cache:
        changed = with_storage(self.model, storage)
        return Cache(storage, changed, damage.sizes(changed, self.model, self.window))

    def llama(self) -> tuple[Reader, list[Cache]]:
        assert self.options.gguf is not None
        opened = llama_cpp.Llama(self.options.gguf, self.window)
        dense = empty(self.model.spec, 1, self.window).nbytes
        return opened.reader(llama_cpp.DENSE), [
            Cache(one.name, opened.reader(one), opened.sizes(one, dense)) for one in llama_cpp.settings()
        ]


def measured(dense: Reader, caches: Sequence[Cache], tokens: np.ndarray) -> list[Record]:
    """Of one window int [1, T]: each row's bytes, KL and rise of the loss, and its program's dense loss."""
    logits = jnp.asarray(dense(tokens))
    right = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
    found = damage.damage(lambda _: logits, [one.reader for one in caches], tokens, 1)
    return [
        {"cache": one.name, **one.sizes, "kl": float(kl), "rise": float(rise), "loss": float(-right.mean())}
        for one, ((kl,), (rise,)) in zip(caches, found, strict=True)
    ]


def table(windows: Sequence[Sequence[Record]]) -> list[Record]:
    """Rows from what was measured of each window."""
    rows = []
    for same in zip(*windows, strict=True):
        kl, rise, loss = (np.array([one[name] for one in same]) for name in ("kl", "rise", "loss"))
        about = {name: same[0][name] for name in ("cache", "token", "sequence")}
        rows.append(about | damage.figures(kl, rise) | {"dense_perplexity": float(np.exp(loss.mean()))})
    return rows


def read_windows(caches: Caches, groups: Sequence[str], tokens: np.ndarray) -> dict[str, list[list[Record]]]:
    """What was measured, by group and window: by an earlier call, or now and kept."""
    opened, options = cache(caches.of), caches.options
    found: dict[str, list[list[Record]]] = {group: [] for group in groups}
    for number in track(range(len(tokens)), "Reading windows"):
        window = tokens[number : number + 1]
        for group in groups:
            what = {"model": caches.source, "group": group, "window": hashlib.sha256(window.tobytes()).hexdigest()}
            if group in ("ours", "llama.cpp"):
                what["of"] = options.storages if group == "ours" else str(options.gguf)
            make = partial(lambda group, window: measured(*opened(group), window), group, window)
            found[group].append(kept(options.out, what, make))
        console.print(f"{Path(caches.source).name}: {number + 1} of {len(tokens)} windows")
    return found


def rivals(options: RivalsOptions) -> Record:
    """All models, one after the other; of each, all groups' rows of one window after the other's."""
    if options.text is None or options.windows < 2:
        raise InputError("expected --text FILE and at least two --windows")
    groups = options.groups
    rows: list[Record] = []
    for source in options.model:
        model = load(source, storage="bfloat16")
        tokens = damage.whole_windows(model.tokenizer, options.text, options.window, options.windows)
        found = read_windows(Caches(source, model, options), groups, tokens)
        for group, seen in found.items():
            rows += [{"model": Path(source).name, "group": group} | row for row in table(seen)]
    return publish(options, "rivals", "Rivals' caches of few bits", rows, COLUMNS, versions_of_rivals=versions(groups))


def versions(groups: Sequence[str]) -> dict[str, str]:
    """Of the packages that rows were made with."""
    packages = {package.split(".")[0] for group in groups for package in GROUPS[group]}
    names = {"optimum": "optimum-quanto", "llama_cpp": "llama-cpp-python"}
    found = {}
    for package in sorted(packages):
        name = names.get(package, package)
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    start(rivals, RivalsOptions, __doc__)
