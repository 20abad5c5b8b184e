"""Reading prompts up to their first new token: ours, and transformers' with scaled_dot_product_attention."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chai_jax.bench.peers import torch_model
from chai_jax.bench.race import Shape, clock
from chai_jax.machine.memory import program_bytes
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.serve.decode import NEVER, prefill
from chai_jax.serve.sample import Sampling


class Read:
    """This package's program that reads `shape.batch` prompts, run as the model is (`Model.how`).

    Args:
        params: the model's, as they are multiplied (`serving_params`).

    Attributes:
        first: the tokens that the last lap chose, int32 [B].
        bytes: `weights_resident`, `kv` of the prompts, and all that the program holds, `prefill_peak`.
    """

    framework = "chai_jax"

    def __init__(self, model: Model, params: Params, shape: Shape, seed: int) -> None:
        self.shape, self.params = shape, params
        tokens = jnp.asarray(shape.inputs(model.config.vocab_size, seed)[0])
        keys = jax.random.split(jax.random.key(seed), shape.batch)
        self.rest = tokens, jnp.ones(tokens.shape, bool), keys, Sampling.checked(), jnp.int32(NEVER)
        began, sizes = time.perf_counter(), {"capacity": shape.prompt + 1, "how": model.how}
        self.program = prefill.lower(model.config, model.spec, params, *self.rest, **sizes).compile()
        self.compile_seconds = time.perf_counter() - began
        self.bytes = {
            "weights_resident": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
            "kv": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.program.out_info.cache.layers)),
            "prefill_peak": program_bytes(self.program),
        }

    def lap(self) -> list[float]:
        """Milliseconds of the batch."""
        milliseconds, state = clock(lambda: self.program(self.params, *self.rest))
        self.first = state.tokens[:, self.shape.prompt]
        return [milliseconds]


class TransformersReads:
    """The dense model as transformers' class of its family in torch, with the same attributes.

    One call, the head at one position.

    Args:
        device, dtype: torch's names; other than the defaults for tests.
    """

    framework = "transformers, sdpa"
    compile_seconds = 0.0

    def __init__(self, model: Model, shape: Shape, seed: int, device: str = "cuda", dtype: str = "bfloat16") -> None:
        import torch

        self.shape, self.device = shape, device
        self.model = torch_model(model).to(device, getattr(torch, dtype))
        prompts = shape.inputs(model.config.vocab_size, seed)[0].astype(np.int64)
        self.tokens = torch.tensor(prompts, device=device)
        self.bytes = {"weights_resident": sum(x.nbytes for x in self.model.parameters())}

    def lap(self) -> list[float]:
        """Milliseconds of the batch."""
        import torch

        wait: Any = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        with torch.no_grad():
            wait()
            began = time.perf_counter()
            logits = self.model(self.tokens, use_cache=True, logits_to_keep=1).logits
            self.first = logits[:, -1].argmax(-1)
            wait()
        return [1e3 * (time.perf_counter() - began)]
