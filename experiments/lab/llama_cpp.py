"""llama.cpp's cache types, through the package llama-cpp-python and a GGUF file of the same weights.

llama.cpp writes keys and values into the cache before attention reads them, so that every token reads all of them, its
own too, as stored; nothing stays in full precision. Its flash attention is on, without which values stay float16. Where
a cache is quantized and heads have a multiple of 64 dimensions, newer versions turn keys and values by a Hadamard
matrix first; `LLAMA_ATTN_ROT_DISABLE` turns that off, as the rows "not turned" do.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chai_jax.errors import InputError
from lab.options import Record

NAMES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
ROTATION = "LLAMA_ATTN_ROT_DISABLE"


@dataclass(frozen=True)
class Types:
    """The cache's types of keys and of values, by llama.cpp's names."""

    keys: str
    values: str
    turned: bool = True

    @property
    def name(self) -> str:
        both = self.keys if self.keys == self.values else f"{self.keys}, values {self.values}"
        return f"llama.cpp, {both}" + ("" if self.turned else ", not turned")


DENSE = Types("f16", "f16")


def settings() -> Iterator[Types]:
    yield from (Types(name, name) for name in NAMES)
    yield Types("q8_0", "q4_0")
    yield from (Types(name, name, turned=False) for name in ("q8_0", "q4_0"))


class Llama:
    """A GGUF file's model, opened by llama.cpp; `reader` makes one context at a time of it."""

    def __init__(self, gguf: Path, window: int):
        import llama_cpp

        self.library, self.window = llama_cpp, window
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(gguf), llama_cpp.llama_model_default_params())
        if not self.model:
            raise InputError(f"llama.cpp cannot open {gguf}; expected a GGUF file of the model's weights")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def context(self, types: Types) -> Any:
        """A context of `window` columns."""
        library = self.library
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = self.window
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k, settings.type_v = (
            getattr(library, f"GGML_TYPE_{name.upper()}") for name in (types.keys, types.values)
        )
        settings.flash_attn_type = 1
        os.environ[ROTATION] = "0" if types.turned else "1"
        made = library.llama_init_from_model(self.model, settings)
        if not made:
            raise InputError(f"llama.cpp makes no context of {self.window} tokens with a cache of {types.name}")
        return made

    def read(self, context: Any, tokens: np.ndarray) -> np.ndarray:
        """Logits [1, T, V] of one window int [1, T], T no more than `window`."""
        library, (row,) = self.library, tokens
        library.llama_memory_clear(library.llama_get_memory(context), True)
        batch = library.llama_batch_init(len(row), 0, 1)
        batch.n_tokens = len(row)
        for at, token in enumerate(row.tolist()):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, True
        status = library.llama_decode(context, batch)
        library.llama_batch_free(batch)
        if status != 0:
            raise InputError(f"llama.cpp gives up on {len(row)} tokens (status {status}); expected --window to fit it")
        found = np.ctypeslib.as_array(library.llama_get_logits(context), (len(row), self.vocabulary))
        return found.copy()[None]

    def reader(self, types: Types) -> Callable[[np.ndarray], np.ndarray]:
        """`read` in a context that is freed with the reader."""
        context = self.context(types)
        free = self.library.llama_free

        class Reader:
            def __call__(_, tokens: np.ndarray) -> np.ndarray:
                return self.read(context, tokens)

            def __del__(_) -> None:
                free(context)

        return Reader()

    def sizes(self, types: Types, dense: int) -> Record:
        """Bytes of a token and of a window as fractions of bfloat16's, by what llama.cpp saves of a sequence.

        Args:
            dense: bytes of a window in bfloat16.
        """
        context, few, found = self.context(types), 16, []
        for length in (few // 2, few):
            self.read(context, np.zeros((1, length), np.int32))
            found.append(self.library.llama_state_seq_get_size(context, 0))
        self.library.llama_free(context)
        token = (found[1] - found[0]) / (few // 2)
        return {"token": token * self.window / dense, "sequence": (found[1] + token * (self.window - few)) / dense}
