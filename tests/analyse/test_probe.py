"""A probe's sums are those of a loop over heads, rows and keys, whatever the padding and the batches."""

import dataclasses
import io
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.analyse.probe import Probe, fingerprint, head_sums, probe
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize
from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan

Make = Callable[..., Model]


def by_loop(seen: Any, kernel: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The sums of one layer from its attention, spelled out."""
    batch, heads, *_ = seen.probabilities.shape
    attention, outputs, scores = np.zeros((heads, heads)), np.zeros((heads, heads)), 0.0
    for b in range(batch):
        real = np.flatnonzero(mask[b])
        for t in real:
            readable = [s for s in real if s <= t]
            scores += sum(abs(float(seen.scores[b, h, t, s])) for h in range(heads) for s in readable)
            rows = np.asarray(seen.probabilities, np.float64)[b, :, t, readable[1:]].T
            if len(readable) > 1:
                rows = rows - rows.mean(axis=1, keepdims=True)
                attention += rows @ rows.T
            added = [np.asarray(seen.heads, np.float64)[b, h, t] @ kernel[h] for h in range(heads)]
            outputs += np.asarray([[one @ other for other in added] for one in added])
    return {"attention": attention, "outputs": outputs, "scores": np.asarray(scores)}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_sums_are_those_of_a_loop(
    make: Make, layers_seen: Callable[..., list[Any]], config: Architecture, padding: str
) -> None:
    model = make(config)
    tokens = np.random.default_rng(1).integers(4, 64, (4, 9)).astype(np.int32)
    mask = np.ones((4, 9), bool)
    for row, pads in enumerate((0, 3, 6, 8) if padding != "none" else ()):
        mask[row, slice(0, pads) if padding == "left" else slice(9 - pads, 9)] = False

    for layer, seen in enumerate(layers_seen(config, model.spec, model.params, tokens, mask)):
        params = model.params["layers"][str(layer)]
        sums, kernel = head_sums(seen, params), np.asarray(params["output"]["kernel"], np.float64)
        for name, wanted in by_loop(seen, kernel, mask).items():
            np.testing.assert_allclose(sums[name], wanted, rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_probe_sums_over_all_windows_however_they_are_batched(make: Make, windows: list[list[int]]) -> None:
    model = make()
    one, two = probe(model, windows, window=16, batch_size=7), probe(model, windows, window=16, batch_size=2)
    for name in ("attention", "outputs", "scores"):
        wanted = getattr(two, name)
        np.testing.assert_allclose(getattr(one, name), wanted, atol=1e-5 * np.abs(wanted).max())
    assert one.rows == sum(map(len, windows))
    assert [row[kept].tolist() for row, kept in zip(one.tokens, one.mask, strict=True)] == windows
    alone = [probe(model, [window], window=16) for window in windows]
    np.testing.assert_allclose(one.attention, sum(part.attention for part in alone), rtol=1e-4, atol=1e-5)
    pairs = [len(window) * (len(window) + 1) // 2 for window in windows]
    scores = np.average([part.scores for part in alone], axis=0, weights=pairs)
    np.testing.assert_allclose(one.scores, scores, rtol=1e-5)


def test_correlations_are_correlations(make: Make, windows: list[list[int]]) -> None:
    correlation = probe(make(), windows).correlation
    np.testing.assert_allclose(np.einsum("lhh->lh", correlation), 1, atol=1e-6)
    np.testing.assert_allclose(correlation, correlation.transpose(0, 2, 1), atol=1e-6)
    assert np.abs(correlation).max() < 1 + 1e-6
    off = correlation[:, ~np.eye(6, dtype=bool)]
    assert np.abs(off).max() < 0.9, "random heads do not attend alike"


def test_a_head_that_is_flat_on_every_row_correlates_with_none(make: Make, windows: list[list[int]]) -> None:
    model = make()
    query = model.params["layers"]["1"]["query"]
    for name in query:
        query[name] = query[name].at[..., 4, :].set(0.0)
    found = probe(model, windows)
    # What the centring leaves of 1/n is rounding, and its correlation noise.
    assert found.attention[1, 4, 4] < 1e-10 * found.attention[1, 0, 0]
    zero = dataclasses.replace(found, attention=np.zeros_like(found.attention))
    assert not zero.correlation.any()


def test_a_silent_head_has_no_output(make: Make, windows: list[list[int]]) -> None:
    model = make()
    output = model.params["layers"]["2"]["output"]
    output["kernel"] = output["kernel"].at[3].set(0.0)
    norms = np.einsum("lhh->lh", probe(model, windows).outputs)
    assert norms[2, 3] == 0
    assert norms[2, 2] > 0


def test_heads_keep_their_numbers_when_they_are_stored_in_another_order(make: Make, windows: list[list[int]]) -> None:
    model = make()
    formats = ("bfloat16", "float32", "bfloat16", "float32", "float32", "bfloat16")
    heads = tuple(ClusterPlan((head,), head, storage=name) for head, name in enumerate(formats))
    stored = quantize(model, Plan((LayerPlan(heads),) * 3))
    assert stored.spec.layers[0].clusters != model.spec.layers[0].clusters
    one, two = probe(model, windows), probe(stored, windows)
    np.testing.assert_allclose(two.correlation, one.correlation, atol=0.02)
    norms, expected = (np.einsum("lhh->lh", found.outputs) for found in (two, one))
    np.testing.assert_allclose(norms, expected, rtol=0.02)


def test_save_and_load(make: Make, windows: list[list[int]], tmp_path: Path) -> None:
    saved = probe(make(), windows)
    saved.save(tmp_path / "probe.npz")
    loaded = Probe.load(tmp_path / "probe.npz")
    for name, value in vars(saved).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
        assert type(getattr(loaded, name)) is type(value)
    assert [path.name for path in tmp_path.iterdir()] == ["probe.npz"]


@pytest.mark.parametrize("content", [None, b"", b"no probe", "pickle", "other"])
def test_what_is_no_probe_is_refused(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "probe.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        np.savez(path, attention=np.asarray([{}]) if content == "pickle" else np.zeros(3))
    with pytest.raises(InputError, match="cannot read the probe"):
        Probe.load(path)


def packed(path: Path, saved: Probe, **arrays: np.ndarray | bytes) -> None:
    """A probe's file with some of its arrays replaced, or their bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, value in {**vars(saved), **arrays}.items():
            if value is None:  # as in a file: the queries of a model that has one for each head
                continue
            content = io.BytesIO()
            if not isinstance(value, bytes):
                np.save(content, np.asarray(value))
            file.writestr(f"{name}.npy", value if isinstance(value, bytes) else content.getvalue())


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)


def test_damaged_probes_are_refused_in_one_line(make: Make, windows: list[list[int]], tmp_path: Path) -> None:
    path, saved = tmp_path / "probe.npz", probe(make(), windows)
    packed(path, saved)
    assert Probe.load(path).fingerprint == saved.fingerprint
    wrong: list[dict[str, np.ndarray | bytes]] = [
        {"attention": np.ones(3)},
        {"attention": np.full((3, 6, 6), np.nan)},
        {"outputs": np.ones((3, 6, 5))},
        {"outputs": np.ones((2, 6, 6))},
        {"scores": np.ones(4)},
        {"scores": np.ones(3, np.int64)},
        {"tokens": saved.tokens.astype(np.int64)},
        {"tokens": np.ones(7, np.int32), "mask": np.ones(7, bool)},
        {"mask": saved.mask[:, :-1]},
        {"fingerprint": np.ones(2)},
        {"queries": np.ones((2, 12, 12))},
        {"queries": np.full((3, 12, 12), np.nan)},
        {"scores": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000)}\n")},
        {"scores": npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({'9' * 400},)}}\n")},
        {"scores": npy("(" * 9000)},
        {"scores": npy("-" * 9000 + "1")},
        {"scores": b""},
    ]
    for arrays in wrong:
        packed(path, saved, **arrays)
        with pytest.raises(InputError, match="cannot read the probe") as caught:
            Probe.load(path)
        assert str(caught.value).isprintable()


def test_torn_probes_are_refused_or_whole(make: Make, windows: list[list[int]], tmp_path: Path) -> None:
    path, saved, random = tmp_path / "probe.npz", probe(make(), windows), np.random.default_rng(0)
    saved.save(path)
    whole = path.read_bytes()
    refused = 0
    for _ in range(200):
        content, at = bytearray(whole), int(random.integers(len(whole)))
        content[at : at + int(random.integers(1, 9))] = random.bytes(int(random.integers(9)))
        path.write_bytes(content)
        try:
            loaded = Probe.load(path)
        except InputError:
            refused += 1
            continue
        for name, value in vars(saved).items():
            np.testing.assert_array_equal(getattr(loaded, name), value)
    assert refused > 100


def test_a_probe_is_a_file_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo, bomb = tmp_path / "fifo", tmp_path / "bomb.npz"
    os.mkfifo(fifo)
    monkeypatch.setattr("chai_jax.analyse.probe.MOST_PROBE_BYTES", 2**20)
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("attention.npy", bytes(2**20 + 1))
    for path, message in ((fifo, "not a regular file"), (bomb, "more than"), (Path("/dev/zero"), "not a regular file")):
        with pytest.raises(InputError, match=message):
            Probe.load(path)


def test_a_fingerprint_sees_every_weight_and_the_configuration(make: Make) -> None:
    model, other = make(), make()
    assert fingerprint(model) == fingerprint(other)
    bias = other.params["layers"]["2"]["down"]["bias"]
    other.params["layers"]["2"]["down"]["bias"] = bias.at[-1].set(math.nextafter(bias[-1], 2) + 1e-6)
    assert fingerprint(model) != fingerprint(other)
    assert fingerprint(model) != fingerprint(model.replace(config=dataclasses.replace(model.config, activation="gelu")))


class Letters:
    """A tokenizer of one token per character, which begins texts as OPT's does."""

    bos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [2] * add_special_tokens + [4 + ord(letter) % 60 for letter in text]}


def test_texts_are_cut_into_windows_that_start_with_the_start_token(make: Make) -> None:
    model = make().replace(tokenizer=Letters())
    found = probe(model, ["", "abcdefghijk", "xyz"], window=5)
    rows = ["abcd", "efgh", "ijk", "xyz"]
    assert [row[kept].tolist() for row, kept in zip(found.tokens, found.mask, strict=True)] == [
        Letters()(row)["input_ids"] for row in rows
    ]
    assert (found.tokens[~found.mask] == model.config.pad_token_id).all()
    assert found.tokens.dtype == np.int32


def test_unusable_input_is_refused(make: Make, windows: list[list[int]]) -> None:
    model = make().replace(tokenizer=Letters())
    with pytest.raises(InputError, match="one string"):
        probe(model, "a text")
    with pytest.raises(InputError, match="has no tokenizer, which text needs"):
        probe(make(), ["some text"])
    with pytest.raises(InputError, match="no window of three tokens"):
        probe(model, ["", "a"])
    with pytest.raises(InputError, match="16 tokens is longer than 8"):
        probe(model, windows, window=8)
    with pytest.raises(InputError, match="25 tokens is longer than 24"):
        probe(model, [[2] * 25])
    plan = Plan((LayerPlan((ClusterPlan((0, 1, 2, 3, 4, 5), 0),)),) * 3)
    with pytest.raises(InputError, match="expected a dense model"):
        probe(cluster(model, plan), windows)


def test_sums_are_float32_in_the_pass_and_float64_on_the_host(
    make: Make, layers_seen: Callable[..., list[Any]], windows: list[list[int]]
) -> None:
    model = make()
    tokens, mask = jnp.asarray([windows[0]], jnp.int32), jnp.ones((1, 16), bool)
    how = model.how.replace(dtype=jnp.dtype("bfloat16"))
    found = layers_seen(model.config, model.spec, model.params, tokens, mask, how)
    sums = [head_sums(seen, model.params["layers"][str(index)]) for index, seen in enumerate(found)]
    assert {leaf.dtype for layer in sums for leaf in layer.values()} == {jnp.dtype(jnp.float32)}
    assert {probe(model, windows).attention.dtype, probe(model, windows).scores.dtype} == {np.dtype(np.float64)}
