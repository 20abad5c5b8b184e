"""A saved compressed model that was tampered with is refused, naming what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize
from chai_jax.errors import InputError
from chai_jax.files.store import load, save
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan

KERNEL = "layers.1.up.kernel"
INT4 = "layers.2.down.kernel"  # [20, 12]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, random_model: Any) -> Path:
    """Three layers, clustered qkv: the first with bfloat16, the second with int8, the third with int4 weights."""
    clusters = (ClusterPlan((0, 2), 0, storage="int8"), ClusterPlan((1,), 1))
    tiers = (("medium", "bfloat16"), ("low", "int8"), ("low", "int4"))
    plan = Plan(tuple(LayerPlan(clusters, tier, weights) for tier, weights in tiers))
    model = cluster(random_model(Architecture(19, 12, 3, 3, 20, 16, 12)), plan)
    folder = tmp_path_factory.mktemp("saved") / "out"
    save(quantize(model, plan), folder)
    (folder / "plan.json").unlink()
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


Tensors = dict[str, np.ndarray]
TENSORS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (
        lambda x: x.pop("final_norm.bias"),
        r"the weights lack final_norm\.bias \[12\], which spec\.json demands",
    ),
    "missing scale": (lambda x: x.pop(f"{KERNEL}.scale"), rf"the weights lack {KERNEL}\.scale \[20\]"),
    "unknown": (lambda x: x.update(extra=np.zeros(2, np.float32)), r"spec\.json has no place for 'extra'"),
    "misshapen": (
        lambda x: x.update({KERNEL: x[KERNEL][1:]}),
        rf"{KERNEL} in model\.safetensors is \[11, 20\]; spec\.json demands \[12, 20\]",
    ),
    "misshapen scale": (
        lambda x: x.update({f"{KERNEL}.scale": x[f"{KERNEL}.scale"][1:]}),
        r"\.scale in .* is \[19\]; .* \[20\]",
    ),
    "floats for int8": (
        lambda x: x.update({KERNEL: x[KERNEL].astype(np.float32)}),
        rf"{KERNEL} .* is float32; .* demands int8",
    ),
    "int8 for floats": (
        lambda x: x.update({"embed.tokens": x["embed.tokens"].astype(np.int8)}),
        r"embed\.tokens in .* is int8; expected one of float32",
    ),
    "wide kernel": (
        lambda x: x.update({"layers.0.down.kernel": x["layers.0.down.kernel"].astype(np.float32)}),
        r"layers\.0\.down\.kernel is float32; spec\.json says that the weights of its layer are bfloat16",
    ),
    "NaN": (
        lambda x: x.update({"final_norm.bias": x["final_norm.bias"] * np.float32(np.nan)}),
        r"final_norm\.bias .* a NaN",
    ),
    "zero scale": (
        lambda x: x.update({f"{KERNEL}.scale": 0 * x[f"{KERNEL}.scale"]}),
        "holds a scale that is not positive",
    ),
    "missing lowest": (lambda x: x.pop(f"{INT4}.low"), rf"the weights lack {INT4}\.low \[1, 12\]"),
    "misshapen lowest": (
        lambda x: x.update({f"{INT4}.low": x[f"{INT4}.low"][:, 1:]}),
        r"\.low in .* is \[1, 11\]; .* \[1, 12\]",
    ),
    "one number a byte": (
        lambda x: x.update({INT4: np.repeat(x[INT4], 2, axis=0)}),
        rf"{INT4} in .* is \[20, 12\]; spec\.json demands \[10, 12\]",
    ),
    "int8 for int4": (lambda x: x.update({INT4: x[INT4].astype(np.int8)}), rf"{INT4} .* is int8; .* demands uint8"),
    "zero int4 scale": (
        lambda x: x.update({f"{INT4}.scale": 0 * x[f"{INT4}.scale"]}),
        rf"{INT4}\.scale in .* holds a scale that is not positive",
    ),
    "NaN lowest": (lambda x: x.update({f"{INT4}.low": x[f"{INT4}.low"] * np.nan}), r"\.low in .* holds a NaN"),
    "infinite scale": (
        lambda x: x.update({f"{KERNEL}.scale": x[f"{KERNEL}.scale"] + np.float32(np.inf)}),
        r"\.scale in .* holds an infinity",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_are_those_that_the_spec_demands(folder: Path, case: str) -> None:
    change, message = TENSORS[case]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def at(value: Any, *path: Any) -> Any:
    for key in path:
        value = value[key]
    return value


SPECS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "layer gone": (lambda x: x["layers"].pop(), r"spec\.json has 2 layers, config\.json 3"),
    "head twice": (
        lambda x: at(x, "layers", 0).update(clusters=[[0, 2], [2]]),
        "layer 0 does not have each of the 3 heads once",
    ),
    "head gone": (
        lambda x: at(x, "layers", 0).update(clusters=[[0, 2], [4]]),
        "does not have each of the 3 heads once",
    ),
    "groups at odds": (lambda x: at(x, "layers", 1, "groups", 0).update(clusters=2), "not a spec|contradicts itself"),
    "unknown storage": (
        lambda x: at(x, "layers", 1, "groups", 0).update(storage="fp4"),
        r"layers\[1\]\.groups\[0\]\.storage is 'fp4'; expected one of float32",
    ),
    "rank above the width": (lambda x: at(x, "layers", 0).update(value_rank=13), "layer 0 has a rank above 12"),
    "rank": (lambda x: at(x, "layers", 0).update(key_rank=3), r"layers\.0\.key\.bias in .* is \[2, 4\]; .* \[2, 3\]"),
    "called dense": (lambda x: at(x, "layers", 0).update(share="dense"), "layer 0 is called dense and is not"),
    "unknown field": (lambda x: at(x, "layers", 0).update(colour=1), "not a spec"),
    "no layers": (lambda x: x.pop("layers"), "not a spec"),
    "int8 undeclared": (lambda x: x["quantized"].pop(KERNEL), rf"{KERNEL} in .* is int8; expected one of float32"),
    "axes of another shape": (
        lambda x: x["quantized"].update({KERNEL: [-1]}),
        rf"{KERNEL}\.scale .* is \[20\]; .* \[12\]",
    ),
    "axes outside": (
        lambda x: x["quantized"].update({KERNEL: [-3]}),
        rf"quantizes {KERNEL} along \[-3\]; expected a kernel",
    ),
    "axes twice": (lambda x: x["quantized"].update({KERNEL: [-2, -2]}), "along its own axes"),
    "int4 as int8": (lambda x: x["quantized"].update({INT4: [-2]}), rf"{INT4} in .* is \[10, 12\]; .* \[20, 12\]"),
    "another group": (
        lambda x: x["quantized"].update({INT4: {"axis": -2, "group": 10}}),
        rf"{INT4}\.scale in .* is \[1, 12\]; .* \[2, 12\]",
    ),
    "no group": (lambda x: x["quantized"].update({INT4: {"axis": -2}}), rf"quantizes {INT4} by .*; expected a kernel"),
    "group of none": (
        lambda x: x["quantized"].update({INT4: {"axis": -2, "group": 0}}),
        rf"quantizes {INT4} by .*; expected a kernel",
    ),
    "axis outside": (
        lambda x: x["quantized"].update({INT4: {"axis": -3, "group": 64}}),
        rf"quantizes {INT4} by .*; expected a kernel",
    ),
    "wider than its layer": (
        lambda x: at(x, "layers", 1).update(weights="int4"),
        r"layers\.1\.\w+\.kernel is int8; spec\.json says that the weights of its layer are int4",
    ),
    "no axes": (lambda x: x["quantized"].update({KERNEL: "rows"}), rf"quantizes {KERNEL} along 'rows'"),
    "a norm": (lambda x: x["quantized"].update({"final_norm.bias": [-1]}), r"quantizes final_norm\.bias along"),
    "unknown name": (lambda x: x["quantized"].update(other=[-1]), r"spec\.json has no place for 'other'"),
    "no dict": (lambda x: x.update(quantized=[]), r"has quantized \[\]; expected names with axes"),
}


@pytest.mark.parametrize("case", SPECS)
def test_the_spec_is_checked(folder: Path, case: str) -> None:
    change, message = SPECS[case]
    spec = json.loads((folder / "spec.json").read_text())
    change(spec)
    (folder / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_what_is_no_spec(folder: Path, content: str) -> None:
    (folder / "spec.json").write_text(content)
    with pytest.raises(InputError, match=r"spec\.json (is not JSON|holds a)"):
        load(folder)


def test_the_spec_must_be_there(folder: Path) -> None:
    (folder / "spec.json").unlink()
    with pytest.raises(InputError, match=r"cannot read .*spec\.json \(No such file or directory\)"):
        load(folder)


def test_untouched_it_loads(folder: Path) -> None:
    assert load(folder).params["layers"]["1"]["up"]["kernel"].values.dtype == jnp.int8
