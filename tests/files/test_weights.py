"""Every format gives the same tree, and every damage is named."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from chai_jax.errors import InputError
from chai_jax.files.store import load
from chai_jax.files.stored import Stored
from chai_jax.files.weights import open_weights, read_safetensors, write_safetensors, write_weights

Arrays = dict[str, np.ndarray]
Write = Callable[..., Path]
FORMATS = ["safetensors", "flax", "torch", "torch stream"]


def by_hand(fields: dict[str, Any], arrays: Arrays) -> dict[str, Any]:
    """The parameter tree, moved number by number where heads are folded."""
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    size = width // heads
    top = {name.removeprefix("model.decoder."): array for name, array in arrays.items()}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": top[f"{name}.weight"], "bias": top[f"{name}.bias"]}

    def project(name: str) -> dict[str, np.ndarray]:
        weight, bias = top[f"{name}.weight"], top[f"{name}.bias"]
        kernel, split = np.zeros((width, heads, size), weight.dtype), np.zeros((heads, size), weight.dtype)
        for h, k in np.ndindex(heads, size):
            kernel[:, h, k], split[h, k] = weight[h * size + k], bias[h * size + k]
        return {"kernel": kernel, "bias": split}

    def output(name: str) -> dict[str, np.ndarray]:
        kernel = np.zeros((heads, size, width), top[f"{name}.weight"].dtype)
        for h, k, d in np.ndindex(kernel.shape):
            kernel[h, k, d] = top[f"{name}.weight"][d, h * size + k]
        return {"kernel": kernel, "bias": top[f"{name}.bias"]}

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"kernel": top[f"{name}.weight"].T, "bias": top[f"{name}.bias"]}

    tree: dict[str, Any] = {"embed": {"tokens": top["embed_tokens.weight"], "positions": top["embed_positions.weight"]}}
    tree["layers"] = {
        str(index): {
            "attention_norm": norm(f"layers.{index}.self_attn_layer_norm"),
            "query": project(f"layers.{index}.self_attn.q_proj"),
            "key": project(f"layers.{index}.self_attn.k_proj"),
            "value": project(f"layers.{index}.self_attn.v_proj"),
            "output": output(f"layers.{index}.self_attn.out_proj"),
            "mlp_norm": norm(f"layers.{index}.final_layer_norm"),
            "up": linear(f"layers.{index}.fc1"),
            "down": linear(f"layers.{index}.fc2"),
        }
        for index in range(fields["num_hidden_layers"])
    }
    if "project_in.weight" in top:
        tree["project_in"] = {"kernel": top["project_in.weight"].T}
        tree["project_out"] = {"kernel": top["project_out.weight"].T}
    if "final_layer_norm.weight" in top:
        tree["final_norm"] = norm("final_layer_norm")
    return tree


def assert_same(ours: Any, wanted: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert isinstance(mine, jax.Array)
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_tree(
    fields: dict[str, Any], write: Write, random_arrays: Any, kind: str, dtype: str, shards: int
) -> None:
    arrays = random_arrays(fields, dtype)
    assert_same(load(write(fields, arrays, kind, shards)).params, by_hand(fields, arrays))


@pytest.mark.parametrize("prefix", ["decoder.", "model.decoder.", ""])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_prefix_gives_the_same_tree(
    fields: dict[str, Any], arrays: Arrays, write: Write, rename: Any, kind: str, prefix: str
) -> None:
    assert_same(load(write(fields, rename(arrays, prefix), kind)).params, by_hand(fields, arrays))


def test_formats_are_preferred_in_order(fields: dict[str, Any], arrays: Arrays, write: Write) -> None:
    folder = write(fields, arrays, "flax")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    load(folder)
    (folder / "model.safetensors").write_bytes(b"read first")
    with pytest.raises(InputError, match=r"model\.safetensors is not a whole safetensors file"):
        load(folder)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no weights; expected one of model\.safetensors, .*pytorch_model\.bin"):
        open_weights(tmp_path)


def damage_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


NAME = "model.decoder.layers.0.fc1.bias"


def shift(header: dict[str, Any]) -> None:
    header[NAME]["data_offsets"][0] += 4


def grow(header: dict[str, Any]) -> None:
    header[NAME]["shape"] = [10**12]


def overlap(header: dict[str, Any]) -> None:
    other = next(name for name in header if name not in (NAME, "__metadata__"))
    header[NAME]["data_offsets"] = header[other]["data_offsets"]


@pytest.mark.parametrize("change", [shift, grow, overlap], ids=["offset", "size", "overlap"])
def test_safetensors_that_contradict_themselves(
    fields: dict[str, Any], arrays: Arrays, write: Write, change: Any
) -> None:
    path = write(fields, arrays) / "model.safetensors"
    damage_header(path, change)
    with pytest.raises(InputError, match=r"is not a whole safetensors file \(.+\); expected one as it was saved"):
        open_weights(path.parent)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
@pytest.mark.parametrize("kind", FORMATS)
def test_cut_files(fields: dict[str, Any], arrays: Arrays, write: Write, kind: str, length: int) -> None:
    folder = write(fields, arrays, kind)
    path = next(path for path in folder.iterdir() if path.name != "config.json")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=rf"{path.name} is not a whole "):
        open_weights(folder)


@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bytes_give_an_error_or_tensors(
    fields: dict[str, Any], arrays: Arrays, write: Write, kind: str
) -> None:
    folder = write(fields, arrays, kind)
    path = next(path for path in folder.iterdir() if path.name != "config.json")
    content, random = path.read_bytes(), np.random.default_rng(0)
    errors = []
    for at in random.integers(0, 3000, 60):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << random.integers(8)]) + content[at + 1 :])
        try:
            assert all(isinstance(stored, Stored) for stored in open_weights(folder).values())
        except InputError as error:
            errors.append(str(error))
    assert errors
    assert not any("\n" in error for error in errors)


def test_missing_shard(fields: dict[str, Any], arrays: Arrays, write: Write) -> None:
    folder = write(fields, arrays, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"names model-00002-of-00003\.safetensors, which is not there"):
        open_weights(folder)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/passwd", "a\\b", "..", "", 7])
def test_index_that_leads_out_of_the_folder(fields: dict[str, Any], arrays: Arrays, write: Write, name: Any) -> None:
    folder = write(fields, arrays, shards=2)
    (folder.parent / "stolen.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NAME] = name
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match="expected a plain file name in the same folder: do not use this model"):
        open_weights(folder)


@pytest.mark.parametrize("weight_map", [None, {}, []])
def test_index_without_weight_map(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="has no weight_map"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda files: files.pop(NAME),
        lambda files: files.update({NAME: next(file for file in files.values() if file != files[NAME])}),
        lambda files: files.update(other="model-00001-of-00002.safetensors"),
    ],
    ids=["unlisted", "elsewhere", "nowhere"],
)
def test_what_is_in_which_shard_the_shards_say(
    fields: dict[str, Any], arrays: Arrays, write: Write, change: Callable[[dict[str, str]], object]
) -> None:
    folder = write(fields, arrays, shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    assert_same(load(folder).params, by_hand(fields, arrays))


@pytest.mark.parametrize("change", [0, 1], ids=["same", "different"])
def test_tensor_in_two_shards(fields: dict[str, Any], arrays: Arrays, write: Write, change: int) -> None:
    folder = write(fields, arrays, shards=2)
    one, two = sorted(folder.glob("*.safetensors"))
    held = load_file(one)
    save_file({**load_file(two), **{name: array + np.float32(change) for name, array in held.items()}}, two)
    if not change:
        assert_same(load(folder).params, by_hand(fields, arrays))
        return
    with pytest.raises(InputError, match=r"is in model-00001.* and, with other numbers, in model-00002"):
        open_weights(folder)


def some(names: dict[str, np.ndarray]) -> dict[str, Stored]:
    return {name: Stored(array.shape, str(array.dtype), "", lambda array=array: array) for name, array in names.items()}


MIXED = {
    "half": np.arange(3, dtype=np.float16),
    "bytes": np.arange(-2, 3, dtype=np.int8),
    "empty": np.zeros((0, 4), np.float32),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "scalar": np.array(7, np.float32),
    "brain": np.arange(4).astype(jnp.bfloat16),
}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", some(MIXED), {"format": "pt"})
    for name, array in load_file(tmp_path / "x.safetensors").items():
        assert (array.dtype, array.shape) == (MIXED[name].dtype, MIXED[name].shape)
        np.testing.assert_array_equal(array, MIXED[name])
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(MIXED)


@pytest.mark.parametrize("most", [1, 16, 24, 30, 10**6])
def test_shards_keep_to_their_size(tmp_path: Path, most: int) -> None:
    write_weights(tmp_path, some(MIXED), {"format": "pt"}, most)
    tensors = open_weights(tmp_path)
    assert {name: stored.shape for name, stored in tensors.items()} == {name: x.shape for name, x in MIXED.items()}
    files = sorted(tmp_path.glob("*.safetensors"))
    for path in files:
        held = read_safetensors(path)
        assert sum(stored.nbytes for stored in held.values()) <= most or len(held) == 1
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in MIXED.values())
    assert (len(files) == 1) == (most == 10**6)
