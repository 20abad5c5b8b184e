"""What does not fit the table is named: missing, unknown, there twice, misshapen, no float, not finite, at odds."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.errors import InputError
from chai_jax.files.convert import tensor_table, to_hf
from chai_jax.files.store import load
from chai_jax.plans.architecture import Architecture

Arrays = dict[str, np.ndarray]
NAME = "model.decoder.layers.1.self_attn.v_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.decoder.embed_tokens.weight"


def with_(array: np.ndarray, number: float) -> np.ndarray:
    array = array.copy()
    array.flat[-1] = number
    return array


CHANGES: dict[str, tuple[Callable[[Arrays], Any], str]] = {
    "missing": (lambda x: x.pop(NAME), rf"the weights lack {NAME} \[12, 12\], which config\.json demands"),
    "unknown": (
        lambda x: x.update(extra=x[NAME]),
        r"model\.safetensors holds 'extra', which a model .* has no place for",
    ),
    "another layer": (
        lambda x: x.update({NAME.replace(".1.", ".2."): x[NAME]}),
        r"holds 'model\.decoder\.layers\.2\.self_attn\.v_proj\.weight', which a model",
    ),
    "twice": (
        lambda x: x.update({NAME.removeprefix("model."): x[NAME]}),
        rf"hold 'layers\.1\.self_attn\.v_proj\.weight' twice, as .*{NAME}",
    ),
    "misshapen": (
        lambda x: x.update({NAME: x[NAME][:, 1:]}),
        rf"{NAME} in .* is \[12, 11\]; config\.json demands \[12, 12\]",
    ),
    "double beyond float32": (
        lambda x: x.update({NAME: with_(x[NAME].astype(np.float64), 1e300)}),
        rf"{NAME} in .*, as float32, holds an infinity",
    ),
    "complex": (
        lambda x: x.update({NAME: x[NAME].astype(np.complex64)}),
        rf"{NAME} in .* is C64; expected one of float32",
    ),
    "integers": (
        lambda x: x.update({NAME: x[NAME].astype(np.int8)}),
        rf"{NAME} in .* is int8; expected one of float32",
    ),
    "NaN": (lambda x: x.update({NAME: with_(x[NAME], np.nan)}), rf"{NAME} in model\.safetensors holds a NaN"),
    "infinity": (
        lambda x: x.update({NAME: with_(x[NAME], -np.inf)}),
        rf"{NAME} in .* holds an infinity; expected finite",
    ),
    "head at odds": (
        lambda x: x.update({HEAD: with_(x[EMBEDDING], 5.0)}),
        rf"{HEAD} differs from {EMBEDDING}, but config\.json ties them",
    ),
    "head misshapen": (
        lambda x: x.update({HEAD: x[EMBEDDING][1:]}),
        rf"{HEAD} differs from {EMBEDDING}, but config\.json ties them",
    ),
    "head alone, misshapen": (
        lambda x: x.update({HEAD: x.pop(EMBEDDING)[1:]}),
        rf"{HEAD} in .* is \[18, .*\]; config\.json demands \[19, ",
    ),
    "head of eight bits": (
        lambda x: x.update({HEAD: x[EMBEDDING].astype(jnp.float8_e4m3fn)}),
        rf"{HEAD} in .* is F8_E4M3; expected one of float32",
    ),
    "head and table of eight bits": (
        lambda x: x.update(dict.fromkeys((HEAD, EMBEDDING), x[EMBEDDING].astype(jnp.float8_e4m3fn))),
        rf"{HEAD} in .* is F8_E4M3; expected one of float32",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_does_not_fit_is_named(
    fields: dict[str, Any], arrays: Arrays, write: Callable[..., Path], case: str
) -> None:
    change, message = CHANGES[case]
    change(arrays)
    with pytest.raises(InputError, match=message) as caught:
        load(write(fields, arrays))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_tied_head_may_be_stored_again(
    fields: dict[str, Any], arrays: Arrays, write: Callable[..., Path], kind: str
) -> None:
    model = load(write(fields, {**arrays, HEAD: arrays[EMBEDDING]}, kind))
    assert "head" not in model.params


@pytest.mark.parametrize("kind", ["safetensors", "flax", "torch"])
def test_untied_head_is_its_own(fields: dict[str, Any], arrays: Arrays, write: Callable[..., Path], kind: str) -> None:
    fields["tie_word_embeddings"] = False
    model = load(write(fields, {**arrays, HEAD: -arrays[EMBEDDING]}, kind))
    np.testing.assert_array_equal(model.params["head"]["kernel"], -arrays[EMBEDDING])


@pytest.mark.parametrize("kind", ["safetensors", "flax", "torch", "torch stream"])
def test_tied_table_may_go_by_the_head_s_name(
    fields: dict[str, Any], arrays: Arrays, write: Callable[..., Path], kind: str
) -> None:
    table = arrays[EMBEDDING]
    arrays[HEAD] = arrays.pop(EMBEDDING)
    model = load(write(fields, arrays, kind))
    np.testing.assert_array_equal(model.params["embed"]["tokens"], table)
    assert "head" not in model.params


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["safetensors", "flax", "torch", "torch stream"])
def test_float64_becomes_float32_or_what_is_asked_for(
    fields: dict[str, Any], arrays: Arrays, write: Callable[..., Path], kind: str, dtype: str | None
) -> None:
    doubles = {name: array.astype(np.float64) + 1e-12 for name, array in arrays.items()}
    model = load(write(fields, doubles, kind), dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(dtype or "float32")}
    np.testing.assert_array_equal(
        model.params["embed"]["tokens"], doubles[EMBEDDING].astype(jnp.dtype(dtype or "float32"))
    )


def test_untied_head_must_be_there(fields: dict[str, Any], arrays: Arrays, write: Callable[..., Path]) -> None:
    fields["tie_word_embeddings"] = False
    with pytest.raises(InputError, match=rf"the weights lack {HEAD}"):
        load(write(fields, arrays))


def test_format_number_of_fairseq_is_dropped(
    fields: dict[str, Any], arrays: Arrays, write: Callable[..., Path]
) -> None:
    model = load(write(fields, {**arrays, "decoder.version": np.array([3.0], np.float32)}))
    np.testing.assert_array_equal(model.params["embed"]["tokens"], arrays[EMBEDDING])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", jnp.bfloat16, np.float16])
def test_cast(fields: dict[str, Any], arrays: Arrays, write: Callable[..., Path], dtype: Any) -> None:
    model = load(write(fields, arrays), dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(model.params["embed"]["tokens"], arrays[EMBEDDING].astype(jnp.dtype(dtype)))


def test_cast_that_overflows(fields: dict[str, Any], arrays: Arrays, write: Callable[..., Path]) -> None:
    arrays[NAME] = with_(arrays[NAME], 1e5)
    with pytest.raises(InputError, match=rf"{NAME} in .*, as float16, holds an infinity.*choose a dtype of more range"):
        load(write(fields, arrays), dtype="float16")


@pytest.mark.parametrize("dtype", ["int8", "float64", "halves", object])
def test_cast_to_what_cannot_hold_weights(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(InputError, match="cannot hold weights; expected one of float32, float16, bfloat16"):
        load(tmp_path, dtype=dtype)


SMALL = Architecture(19, 12, 11, 3, 20, 16, 12)
VARIANTS: dict[str, dict[str, Any]] = {
    "125m": {},
    "350m": {"pre_norm": False, "embed_dim": 8},
    "no biases": {"bias": False},
    "plain norms": {"norm_affine": False},
    "no final norm": {"remove_final_norm": True},
    "untied": {"tied": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_is_that_of_torch(torch: Any, variant: str) -> None:
    """Names and shapes are those of the module's own state dict, lm_head aside where it is tied."""
    from transformers import OPTConfig as HFConfig
    from transformers import OPTForCausalLM

    from chai_jax.files.families.opt import FAMILY, config_fields

    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    with torch.device("meta"):
        state = OPTForCausalLM(HFConfig(**config_fields(config))).state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if config.tied:
        del wanted[HEAD]
    assert {FAMILY.full_name(row.name): row.theirs for row in tensor_table(config)} == wanted


def test_there_and_back(fields: dict[str, Any], arrays: Arrays, write: Callable[..., Path]) -> None:
    model = load(write(fields, arrays))
    back = to_hf(model.config, model.params)
    assert back.keys() == arrays.keys()
    for name, stored in back.items():
        assert stored.shape == arrays[name].shape
        np.testing.assert_array_equal(stored.read(), arrays[name])
