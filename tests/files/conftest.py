"""Checkpoints of small random OPTs, written by the libraries that people's checkpoints were written by."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from safetensors.numpy import save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chai_jax.files.store import load
from chai_jax.model.model import Model
from chai_jax.model.params import Declared, declare
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

Arrays = dict[str, np.ndarray]
PRE = {
    "model_type": "opt",
    "vocab_size": 19,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "ffn_dim": 20,
    "max_position_embeddings": 16,
}
FIELDS = {"pre-norm": PRE, "post-norm": {**PRE, "do_layer_norm_before": False, "word_embed_proj_dim": 8}}


def random_arrays(fields: dict[str, Any], dtype: str = "float32") -> Arrays:
    """The tensors of torch's `OPTForCausalLM(fields).state_dict()`, without lm_head, as random numbers."""
    width, ffn, vocab = fields["hidden_size"], fields["ffn_dim"], fields["vocab_size"]
    embed = fields.get("word_embed_proj_dim", width)
    shapes = {
        "embed_tokens.weight": (vocab, embed),
        "embed_positions.weight": (fields["max_position_embeddings"] + 2, width),
    }
    for layer in range(fields["num_hidden_layers"]):
        inside = {f"self_attn.{name}_proj": (width, width) for name in ("k", "v", "q", "out")}
        inside |= {
            "self_attn_layer_norm": (width,),
            "fc1": (ffn, width),
            "fc2": (width, ffn),
            "final_layer_norm": (width,),
        }
        for name, shape in inside.items():
            shapes |= {f"layers.{layer}.{name}.weight": shape, f"layers.{layer}.{name}.bias": shape[:1]}
    if embed != width:
        shapes |= {"project_in.weight": (width, embed), "project_out.weight": (embed, width)}
    if fields.get("do_layer_norm_before", True):
        shapes |= {"final_layer_norm.weight": (width,), "final_layer_norm.bias": (width,)}
    random = np.random.default_rng(0)
    return {
        f"model.decoder.{name}": random.normal(size=shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()
    }


def rename(arrays: Arrays, prefix: str) -> Arrays:
    return {prefix + name.removeprefix("model.decoder."): array for name, array in arrays.items()}


def to_flax(arrays: Arrays) -> dict[str, Any]:
    """The same tensors as the nested dict of transformers' `FlaxOPTForCausalLM`."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, module, leaf = name.split(".")
        node = tree
        for parent in (*parents, module):
            node = node.setdefault(parent, {})
        if leaf == "bias":
            node["bias"] = array
        elif module.startswith("embed_"):
            node["embedding"] = array
        elif module.endswith("layer_norm"):
            node["scale"] = array
        else:
            node["kernel"] = np.ascontiguousarray(array.T)
    return tree


def flat(tree: dict[str, Any], parents: tuple[str, ...] = ()) -> list[str]:
    """The names of a Flax tree's leaves as an index spells them."""
    names = []
    for name, child in tree.items():
        names += flat(child, (*parents, name)) if isinstance(child, dict) else ["/".join((*parents, name))]
    return names


def write_one(path: Path, arrays: Arrays, **options: Any) -> list[str]:
    """Write one weight file in the format its name tells; returns the names its index would list."""
    if path.suffix == ".safetensors":
        save_file(arrays, path, metadata={"format": "pt"})
    elif path.suffix == ".msgpack":
        path.write_bytes(msgpack_serialize(to_flax(arrays)))
        return flat(to_flax(arrays))
    else:
        torch = pytest.importorskip("torch")
        # torch takes no numpy bfloat16.
        tensors = {
            name: torch.tensor(array.astype(np.float64)).to(getattr(torch, str(array.dtype)))
            for name, array in arrays.items()
        }
        torch.save(tensors, path, **options)
    return list(arrays)


FILES = {
    "safetensors": ("model.safetensors", {}),
    "flax": ("flax_model.msgpack", {}),
    "torch": ("pytorch_model.bin", {}),
    "torch stream": ("pytorch_model.bin", {"_use_new_zipfile_serialization": False}),
}


def random_model(config: Architecture, dtype: str = "float32", storage: str = "float32", **options: Any) -> Model:
    """A dense model with random parameters, none of them trivial, made by numpy: nothing is compiled."""
    spec = Spec.of(config, storage)
    random = np.random.default_rng(1)

    def leaf(what: Declared) -> jax.Array:
        return jnp.asarray((0.3 * random.normal(size=what.shape)).astype(jnp.dtype(dtype)))

    return Model(config, spec, jax.tree.map(leaf, declare(config, spec)), **options)


@pytest.fixture(scope="session", name="random_model")
def _random_model() -> Callable[..., Model]:
    return random_model


@pytest.fixture(name="random_arrays")
def _random_arrays() -> Callable[..., Arrays]:
    return random_arrays


@pytest.fixture(name="rename")
def _rename() -> Callable[[Arrays, str], Arrays]:
    return rename


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a Hugging Face folder: `write(fields, arrays, format, shards)`."""

    def write_folder(fields: dict[str, Any], arrays: Arrays, kind: str = "safetensors", shards: int = 1) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(fields))
        file, options = FILES[kind]
        if shards == 1:
            write_one(folder / file, arrays, **options)
            return folder
        stem, _, extension = file.rpartition(".")
        weight_map = {}
        for number in range(shards):
            part = {name: arrays[name] for name in list(arrays)[number::shards]}
            name = f"{stem}-{number + 1:05d}-of-{shards:05d}.{extension}"
            weight_map |= dict.fromkeys(write_one(folder / name, part, **options), name)
        (folder / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return write_folder


@pytest.fixture(params=FIELDS)
def fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    """config.json of a small OPT, pre-norm or post-norm with narrow embeddings."""
    return dict(FIELDS[request.param])


@pytest.fixture
def arrays(fields: dict[str, Any]) -> Arrays:
    """Its tensors, in float32, under torch's names."""
    return random_arrays(fields)


@pytest.fixture
def model(fields: dict[str, Any], arrays: Arrays, write: Callable[..., Path]) -> Model:
    """It, loaded."""
    return load(write(fields, arrays))


@pytest.fixture
def write_tokenizer() -> Callable[[Path], None]:
    """Put OPT's kind of tokenizer into a folder: byte-level BPE without merges, 260 tokens, </s> in front."""

    def write_files(folder: Path) -> None:
        words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(bytes_to_unicode().values())]
        (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
        settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False, **names}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    return write_files
