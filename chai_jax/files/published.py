"""The shapes of published models, known without their files, and random weights in them."""

import difflib

import jax
import jax.numpy as jnp
from jaxtyping import Array

from chai_jax.errors import InputError
from chai_jax.files.contents import open_contents
from chai_jax.files.families.registry import FAMILIES, find_family
from chai_jax.files.gguf.model import is_gguf
from chai_jax.inputs.paths import user_path
from chai_jax.inputs.reading import shown
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

PUBLISHED = {name: shape for family in FAMILIES.values() for name, shape in family.published.items()}


def architecture_of(model: str) -> Architecture:
    """The shape of a model: of a published one by its hub id, or of a folder with a config.json or a GGUF file.

    A hub id may be short of its owner ("gpt2", "Llama-3.2-1B"), unless a folder has that name.

    Raises:
        InputError: it is neither, or the folder's model is of no family that we know.
    """
    if model in PUBLISHED:
        return PUBLISHED[model]
    path = user_path(model)
    if is_gguf(path) or (path / "config.json").is_file():
        contents = open_contents(path)
        family, _ = find_family(contents.fields.get("model_type"), model)
        return family.parse_config(contents.fields, contents.where)
    owned = [name for name in PUBLISHED if name.rpartition("/")[2] == model]
    if len(owned) == 1:
        return PUBLISHED[owned[0]]
    near = difflib.get_close_matches(model, PUBLISHED, n=1, cutoff=0.0)
    raise InputError(
        f"{shown(model)} is no folder with a config.json; expected one, or a published shape, such as {near[0]}: "
        "chai-jax aot --help names them"
    )


def random_model(shape: str, seed: int) -> Model:
    """Random weights in a published shape, or that of a folder's config.json; no file of weights is read.

    They are float32, rounded to float16, since published ones have 16 bits: some kernels are faster for it.

    Raises:
        InputError: `shape` names neither.
    """
    config = architecture_of(shape)
    spec = Spec.of(config)
    params = jax.tree.map(_rounded, init(config, spec, jax.random.key(seed)))
    return Model(config, spec, params, source=f"random:{shape}")


@jax.jit
def _rounded(x: Array) -> Array:
    return x.astype(jnp.float16).astype(x.dtype)
