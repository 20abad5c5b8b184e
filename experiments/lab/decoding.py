"""Decoding from the middle of a cache on: ours, and transformers' with a static cache under torch.compile.

Nobody reads the prompt: the cache is made with `shape.prompt` columns in use and arbitrary numbers in them, on which no
time depends. A lap decodes `shape.new_tokens` steps greedily, none stops early; the next lap begins where it began.
"""

import gc
import importlib.metadata
import importlib.util
import inspect
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp

from chai_jax.bench.peers import stay_awake, torch_model
from chai_jax.bench.race import Shape, clock
from chai_jax.machine.memory import program_bytes
from chai_jax.model.cache import Cache, cache_bytes, empty
from chai_jax.model.model import Model
from chai_jax.model.params import Params, fold_projections
from chai_jax.plans.spec import Spec
from chai_jax.serve.decode import NEVER, Decoding, cast, decode
from chai_jax.serve.sample import Sampling

FIRST = 4  # the token that every sequence goes on from


@partial(jax.jit, static_argnames=("shape", "dtype"))
def random_entries(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    """An array of a cache, [B, heads, S or blocks, ...]: random entries of one head, the same for all."""
    key = jax.random.key(seed)
    if jnp.issubdtype(dtype, jnp.integer):
        least, most = (-127, 128) if dtype == jnp.int8 else (0, 256)  # int8, or packed bits and scales of a byte
        row = jax.random.randint(key, shape[2:], least, most, dtype)
    else:  # scales have no channels
        row = jax.random.normal(key, shape[2:], dtype) if len(shape) >= 4 else jnp.full(shape[2:], 0.02, dtype)
    return jnp.broadcast_to(row, shape)


def random_layers(spec: Spec, batch: int, capacity: int, seed: int) -> Any:
    """Layers of a cache as `empty` makes them, but with random entries."""
    shapes = jax.eval_shape(partial(empty, spec, batch, capacity)).layers
    return jax.tree.map(lambda x: random_entries(x.shape, x.dtype, seed), shapes)


@dataclass
class Held:
    """What programs of one model and shape have in common: one lap after the other, they need it once.

    Attributes:
        layers: the cache's, with whatever the last lap left in it; each lap uses them up and makes them anew. Shapes
            will do to compile.
    """

    params: Params
    layers: Any

    @classmethod
    def of(cls, model: Model, shape: Shape, seed: int) -> Self:
        params = fold_projections(cast(model.params, model.how))
        layers = random_layers(model.spec, shape.batch, shape.prompt + shape.new_tokens, seed)
        return cls(*jax.block_until_ready((params, layers)))


class Ours:
    """This package's decoding program at one shape, run as the model is (`Model.how`).

    Attributes:
        tokens: what the last lap decoded, int32 [B, new tokens].
        bytes: `weights_resident`, `kv` as allocated, `kv_formula`, and all that the program holds, `decode_peak`.
    """

    framework = "chai_jax"

    def __init__(self, model: Model, shape: Shape, seed: int, held: Held | None = None) -> None:
        self.shape, self.until, self.seed = shape, shape.prompt + shape.new_tokens, seed
        self.held = held or Held.of(model, shape, seed)
        self.rest = jnp.int32(shape.new_tokens), Sampling.checked(), jnp.int32(NEVER)
        began, state = time.perf_counter(), self._state()
        lowered = decode.lower(model.config, model.spec, self.held.params, state, *self.rest, how=model.how)
        self.program = lowered.compile()
        self.compile_seconds = time.perf_counter() - began
        self.bytes = {
            "weights_resident": sum(leaf.nbytes for leaf in jax.tree.leaves(self.held.params)),
            "kv": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.held.layers)),
            "kv_formula": cache_bytes(model.spec, shape.batch, self.until),
            "decode_peak": program_bytes(self.program),
        }

    def _state(self) -> Decoding:
        """As at the beginning of a lap, with whatever the cache holds."""
        batch, start = self.shape.batch, self.shape.prompt
        mask = jnp.tile(jnp.arange(self.until) < start, (batch, 1))
        tokens = jnp.full((batch, self.until + 1), FIRST, jnp.int32)
        keys = jax.random.split(jax.random.key(self.seed), batch)
        cache = Cache(self.held.layers, mask, jnp.full(batch, start, jnp.int32))
        return Decoding(cache, tokens, jnp.zeros(batch, bool), keys, jnp.int32(0))

    def lap(self) -> list[float]:
        """Milliseconds of one step of the batch, the mean over the lap."""
        state = jax.block_until_ready(self._state())
        milliseconds, state = clock(lambda: self.program(self.held.params, state, *self.rest))
        self.held.layers = state.cache.layers  # the old ones were donated
        self.tokens = state.tokens[:, self.shape.prompt + 1 :]
        return [milliseconds / self.shape.new_tokens]


def torch_absent() -> str | None:
    """Why transformers cannot be timed on a GPU here, if so."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"


def torch_version() -> str:
    return importlib.metadata.version("torch") if importlib.util.find_spec("torch") else "not installed"


class Transformers:
    """The dense model as transformers' class of its family in torch, with the same attributes.

    It is given what favours it: CUDA graphs, no prompt, no padding, a mask made ahead, the head at one position, and on
    CPUs threads that stay awake.

    Args:
        device, dtype: torch's names.
        backend: of torch.compile, which makes one program of a step; None: eager.
    """

    def __init__(
        self,
        model: Model,
        shape: Shape,
        device: str = "cuda",
        dtype: str = "bfloat16",
        backend: str | None = "inductor",
    ) -> None:
        stay_awake()
        import torch
        from transformers import StaticCache

        self.shape, self.until, self.device = shape, shape.prompt + shape.new_tokens, device
        config, kind = model.config, getattr(torch, dtype)
        self.model = torch_model(model).to(device, kind)
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.until)
        self.cache.early_initialization(shape.batch, config.kv_heads, config.head_dim, kind, torch.device(device))
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        # The argument's name changed within transformers 5.
        known = inspect.signature(self.model.get_decoder().forward).parameters
        self.named = {"cache" if "cache" in known else "past_key_values": self.cache}
        graphs = {"mode": "reduce-overhead"} if device == "cuda" and backend == "inductor" else {}
        eager = backend is None
        self.framework = f"transformers, static cache, {'eager' if eager else 'torch.compile'}"
        self.step = self._step if eager else torch.compile(self._step, backend=backend, fullgraph=True, **graphs)
        began = time.perf_counter()
        self.lap()
        self.compile_seconds = time.perf_counter() - began  # with one lap
        kv = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        self.bytes = {"weights_resident": sum(x.nbytes for x in self.model.parameters()), "kv": kv}

    def _step(self, token: Any, position: Any, mask: Any) -> Any:
        """The likeliest token [B, 1] behind this one."""
        seen = self.model(
            token, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1, **self.named
        )
        return seen.logits[:, -1].argmax(-1, keepdim=True)

    def lap(self) -> list[float]:
        """Milliseconds of one step of the batch, the mean over the lap."""
        import torch

        batch, start = self.shape.batch, self.shape.prompt
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        with torch.no_grad():
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(start)
            mask = (torch.arange(self.until, device=self.device) < start).repeat(batch, 1, 1, 1)
            position = torch.full((batch, 1), start, device=self.device)
            token, made = torch.full_like(position, FIRST), []
            wait()
            began = time.perf_counter()
            for at in range(start, self.until):
                mask[..., at] = True
                token = self.step(token, position, mask).clone()  # the next replay of a CUDA graph overwrites it
                position += 1
                made.append(token)
            wait()
            milliseconds = 1e3 * (time.perf_counter() - began)
        self.tokens = torch.cat(made, dim=1)
        return [milliseconds / self.shape.new_tokens]


def exhausted(error: Exception) -> bool:
    """Whether JAX or torch says that memory ran out."""
    return any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "out of memory"))


def release() -> None:
    """Give back what torch holds of the GPU for models that are gone."""
    gc.collect()
    if "torch" in sys.modules and (torch := sys.modules["torch"]).cuda.is_available():
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
