"""The same model in other frameworks, timed beside ours: torch transformers and CTranslate2, on a CPU, in our dtype.

Each peer is given what favours it: one loop without the bookkeeping of a general `generate`, the vocabulary head at
the last position alone, prompts of equal length without padding, threads that stay awake, and no other peer in the
process. The only file that imports torch or ctranslate2, neither of which is needed for anything else.
"""

import importlib.util
import inspect
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from chai_jax.bench.race import ANSWERS, Contender, Shape
from chai_jax.compress.expand import expand
from chai_jax.errors import InputError
from chai_jax.files.convert import to_hf
from chai_jax.files.families.registry import family_of
from chai_jax.model.model import Model

# GNU's OpenMP lets threads sleep at once where there are more of them than CPUs, as CTranslate2's always are. After so
# many turns of waiting, less than a millisecond, they sleep all the same, out of our way.
AWAKE = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "100000"}


def stay_awake() -> None:
    """Set `AWAKE` for libraries that are not loaded yet, but for what the user set; GNU's OpenMP is Linux's."""
    for name, value in AWAKE.items() if sys.platform == "linux" else ():
        os.environ.setdefault(name, value)


def check_peer(name: str) -> None:
    """Raise InputError unless this peer is known and can be timed here: installed, and JAX on a CPU as it is itself."""
    if name not in PEERS:
        raise InputError(f"--peer {name} is unknown; expected one of {', '.join(PEERS)}")
    missing = [library for library in PEERS[name].libraries if importlib.util.find_spec(library) is None]
    if missing:
        raise InputError(
            f"--peer {name} needs {missing[0]}, which is not installed; install the extra chai_jax[peers], or leave "
            "--peer out"
        )
    if jax.default_backend() != "cpu":
        raise InputError(
            f"--peer {name} computes on the CPU, JAX here on {jax.default_backend()}; expected equals: set "
            "JAX_PLATFORMS=cpu, or leave --peer out"
        )


def torch_model(model: Model) -> Any:
    """The model as transformers' class of its family in float32; a clustered one is expanded to all its heads.

    Raises:
        InputError: the model has no ordinary form (see `expand`).
    """
    import torch
    import transformers

    dense = expand(model)
    family = family_of(dense.config)
    weights = {
        name: torch.from_numpy(np.array(stored.read(), np.float32))
        for name, stored in to_hf(dense.config, dense.params).items()
    }
    config = transformers.AutoConfig.for_model(family.model_type, **family.config_fields(dense.config))
    transformers.utils.logging.disable_progress_bar()
    twin, found = getattr(transformers, family.torch_class).from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    return twin.eval()


class HuggingFace:
    """Builds torch contenders of one model; its threads are torch's own pool, which is set for the whole process."""

    libraries = ("torch",)
    framework = "transformers"

    def __init__(self, model: Model, threads: int) -> None:
        stay_awake()
        import torch

        torch.set_num_threads(threads)
        self.model = torch_model(model).to(getattr(torch, model.how.dtype.name))

    def __call__(self, shape: Shape, seed: int) -> Contender:
        return TorchTimed(self.model, shape, seed)


class TorchTimed:
    """A transformers model at one shape: eager torch, a `DynamicCache`, a greedy loop over the model's forward."""

    compile_seconds = 0.0

    def __init__(self, model: Any, shape: Shape, seed: int) -> None:
        import torch

        self.model, self.shape = model, shape
        self.prompts, self.questions = (
            torch.from_numpy(tokens.astype(np.int64)) for tokens in shape.inputs(model.config.vocab_size, seed)
        )
        # The cache's name changed within transformers 5.
        known = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"
        self.bytes = {"weights": sum(x.numel() * x.element_size() for x in model.parameters())}

    def score(self) -> tuple[float, Any]:
        import torch

        with torch.inference_mode():
            began = time.perf_counter()
            logits = self.model(self.questions, use_cache=False, logits_to_keep=1).logits
            found = logits[:, -1].log_softmax(-1)[:, ANSWERS]
            return 1e3 * (time.perf_counter() - began), found

    def generate(self) -> tuple[float, float, Any]:
        import torch
        from transformers import DynamicCache

        with torch.inference_mode():
            began = time.perf_counter()
            cache: Any = DynamicCache(config=self.model.config)
            made = [self._next(self.prompts, cache)]
            read = time.perf_counter()
            for _ in range(self.shape.new_tokens):
                made.append(self._next(made[-1], cache))
            ended = time.perf_counter()
        self.bytes["kv"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return 1e3 * (read - began), 1e3 * (ended - read), torch.cat(made, dim=1)

    def _next(self, tokens: Any, cache: Any) -> Any:
        """The likeliest token [B, 1] behind these and what the cache holds, which then holds these as well."""
        seen = self.model(tokens, use_cache=True, logits_to_keep=1, **{self.cache_name: cache})
        return seen.logits[:, -1].argmax(-1, keepdim=True)


NO_WINDOWS = ("qwen2", "qwen3", "phi3")  # of which CTranslate2's converter reads no windows
NEAR = {"float32": 0.01, "bfloat16": 0.1}  # of log-probabilities that are the same but for rounding: see `_check_same`


class CTranslate2:
    """Builds CTranslate2 contenders of one model, which is converted to a temporary folder and loaded from there.

    Raises:
        InputError: it does not take the model, or computes something else.
    """

    libraries = ("ctranslate2", "torch")
    framework = "ctranslate2"

    def __init__(self, model: Model, threads: int) -> None:
        stay_awake()
        import ctranslate2
        import torch

        dtype, config = model.how.dtype.name, model.config
        if config.family == "opt" and config.vocab_size % 8:
            raise InputError(
                f"the vocabulary has {config.vocab_size} tokens, of which CTranslate2's converter expects a multiple "
                "of 8: leave --peer ctranslate2 out"
            )
        if dtype not in ctranslate2.get_supported_compute_types("cpu"):
            raise InputError(f"CTranslate2 does not compute in {dtype} on this CPU: leave --peer ctranslate2 out")
        if any(config.windows) and config.family in NO_WINDOWS:
            _refuse(model, "it knows none of their windows")
        twin = torch_model(model)
        tokens = np.random.default_rng(0).integers(4, config.vocab_size, (1, min(64, config.max_positions)))
        with torch.inference_mode():
            expected = twin(torch.from_numpy(tokens)).logits[0].log_softmax(-1).numpy()
        self.vocabulary = config.vocab_size
        try:
            with tempfile.TemporaryDirectory() as folder:
                converted = _converted(model, twin, folder, dtype)
                self.nbytes = (Path(converted) / "model.bin").stat().st_size
                self.generator = ctranslate2.Generator(
                    converted, device="cpu", compute_type=dtype, intra_threads=threads, inter_threads=1
                )
            found = self.generator.forward_batch([list(map(str, tokens[0].tolist()))], return_log_probs=True)
        # Whatever it stumbles over: a family or an option that it does not know, names of another version.
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            _refuse(model, f"{type(error).__name__}: {error!s:.100}".splitlines()[0])
        _check_same(model, np.asarray(found.to(ctranslate2.DataType.float32))[0], expected)

    def __call__(self, shape: Shape, seed: int) -> Contender:
        return CTranslate2Timed(self, shape, seed)


def _converted(model: Model, twin: Any, folder: str, dtype: str) -> str:
    """The folder that CTranslate2's converter makes of torch's model, within `folder`."""
    from ctranslate2.converters.transformers import TransformersConverter

    class InMemory(TransformersConverter):  # type: ignore[misc]
        """Converts a model that is there, its tokens named by their numbers: no tokenizer is needed."""

        def load_model(self, *args: Any, **options: Any) -> Any:
            return twin

        def load_tokenizer(self, *args: Any, **options: Any) -> Any:
            return Numbers(model)

    twin.config.save_pretrained(folder)
    return str(InMemory(folder).convert(str(Path(folder) / "converted"), quantization=dtype))


def _check_same(model: Model, found: np.ndarray, expected: np.ndarray) -> None:
    """Log-probabilities [T, V] of the same tokens: their difference is small beside their spread."""
    spread = np.linalg.norm(expected - expected.mean(-1, keepdims=True))
    away = float(np.linalg.norm(found - expected) / spread)
    if not away <= NEAR[model.how.dtype.name]:
        _refuse(model, f"its log-probabilities are {away:.0%} away from torch's")


def _refuse(model: Model, why: str) -> NoReturn:
    """Raise the InputError of a model that is not CTranslate2's to compute."""
    name = family_of(model.config).name
    raise InputError(f"CTranslate2 does not run such a {name} as we do ({why}): leave --peer ctranslate2 out")


class Numbers:
    """As much of a tokenizer as CTranslate2's converter asks for: token 7 is named "7".

    The converter wants one token of each kind. Of several ends it gets the first, and the padding in place of a token
    that the model does not have: what is timed neither begins with them nor ends at them.
    """

    def __init__(self, model: Model) -> None:
        begin, end, pad = model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id
        self.size = model.config.vocab_size
        self.bos_token = str(pad if begin is None else begin)
        self.eos_token = str(pad if end is None else end[0] if isinstance(end, tuple) else end)
        self.unk_token = self.pad_token = str(pad)

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(self.size)}


class CTranslate2Timed:
    """A CTranslate2 model at one shape. It tells by a callback when each token is there; its cache it does not tell."""

    compile_seconds = 0.0

    def __init__(self, built: CTranslate2, shape: Shape, seed: int) -> None:
        self.generator, self.shape = built.generator, shape
        self.prompts, self.questions = (
            [list(map(str, row)) for row in tokens.tolist()] for tokens in shape.inputs(built.vocabulary, seed)
        )
        self.bytes = {"weights": built.nbytes}

    def score(self) -> tuple[float, Any]:
        began = time.perf_counter()
        found = self._generate(self.questions, 1, return_logits_vocab=True)
        logits = np.stack([np.asarray(one.logits[0]).reshape(-1) for one in found])
        shifted = logits - logits.max(-1, keepdims=True)
        logprobs = shifted[:, ANSWERS] - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return 1e3 * (time.perf_counter() - began), logprobs

    def generate(self) -> tuple[float, float, Any]:
        first: list[float] = []

        def told(step: Any) -> bool:
            if step.step == 0:
                first.append(time.perf_counter())
            return False

        began = time.perf_counter()
        found = self._generate(self.prompts, self.shape.new_tokens + 1, callback=told)
        ended = time.perf_counter()
        tokens = np.array([one.sequences_ids[0] for one in found])
        return 1e3 * (first[-1] - began), 1e3 * (ended - first[-1]), tokens

    def _generate(self, tokens: list[list[str]], count: int, **options: Any) -> Any:
        """`count` likeliest tokens behind each row; nothing ends a sequence earlier."""
        return self.generator.generate_batch(
            tokens, max_length=count, beam_size=1, include_prompt_in_result=False, end_token=[], **options
        )


PEERS: dict[str, type[HuggingFace] | type[CTranslate2]] = {"hf": HuggingFace, "ctranslate2": CTranslate2}
