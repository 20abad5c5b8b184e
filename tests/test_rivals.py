"""Rivals' caches: what is computed for a whole window at once is what decoding token by token reads."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chai_jax.errors import InputError

pytestmark = pytest.mark.slow
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
LENGTH = 150


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def llama(torch: ModuleType) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.4, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 61, (1, LENGTH))


def one_by_one(model: Any, tokens: np.ndarray, layer: Callable[[], Any], prompt: int = 1) -> np.ndarray:
    """Logits [1, T, V] by decoding: the prompt, then each token by itself."""
    import torch
    from transformers import Cache

    held = Cache(layers=[layer() for _ in range(model.config.num_hidden_layers)])
    ids = torch.as_tensor(tokens)
    pieces = (slice(0, prompt), *(slice(at, at + 1) for at in range(prompt, tokens.shape[1])))
    with torch.no_grad():
        parts = [model(ids[:, piece], cache=held).logits for piece in pieces]
    return np.asarray(torch.cat(parts, dim=1))


def kivi_layer(bits: int, residual: int) -> Any:
    """KIVI's cache as its program keeps it: lists of what is quantized and of what is not, moved along as they fill."""
    import torch
    from transformers.cache_utils import DynamicLayer

    def rounded(x: Any, axis: int) -> Any:
        low = x.amin(axis, keepdim=True).bfloat16().float()
        step = ((x.amax(axis, keepdim=True) - low) / (2**bits - 1)).bfloat16().float()
        return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low

    class Kivi(DynamicLayer):  # type: ignore[misc]
        def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                self.parts = [keys[:, :, :0]] * 4
                self.seen = 0
            self.seen += 1
            old_keys, new_keys, old_values, new_values = self.parts
            new_keys, new_values = torch.cat([new_keys, keys], 2), torch.cat([new_values, values], 2)
            read = torch.cat([old_keys, new_keys], 2), torch.cat([old_values, new_values], 2)
            if new_keys.shape[2] == residual:
                groups = [rounded(part, 2) for part in new_keys.split(32, dim=2)]
                old_keys, new_keys = torch.cat([old_keys, *groups], 2), new_keys[:, :, :0]
            if new_values.shape[2] > residual:
                first = torch.cat([rounded(part, 3) for part in new_values[:, :, :1].split(32, dim=3)], 3)
                old_values, new_values = torch.cat([old_values, first], 2), new_values[:, :, 1:]
            self.parts = [old_keys, new_keys, old_values, new_values]
            return read

        def get_seq_length(self) -> int:
            return getattr(self, "seen", 0)

    return Kivi()


@pytest.mark.parametrize("residual", [32, 64])
def test_kivis_settings_read_what_its_decoding_reads(llama: Any, tokens: np.ndarray, residual: int) -> None:
    others = script("lab.settings_of_others")
    made = others.reader(llama, others.kivi(2, residual))(tokens)
    # A number halfway between two levels may go either way, and a few rows feel it.
    off = np.abs(made - one_by_one(llama, tokens, lambda: kivi_layer(2, residual)))
    assert np.quantile(off, 0.9) < 2e-3
    assert off.max() < 0.1
    plain = others.reader(llama, others.turboquant(4, sinks=LENGTH))(tokens)  # all is whole
    dense = one_by_one(llama, tokens, dense_layer)
    np.testing.assert_allclose(plain, dense, atol=1e-3)
    assert np.abs(made - dense)[:, :residual].max() < 1e-3
    assert np.abs(made - dense)[:, residual + 1 :].max() > 0.1


def dense_layer() -> Any:
    from transformers.cache_utils import DynamicLayer

    return DynamicLayer()


def rounding_layer() -> Any:
    """transformers' residual cache over a quantizer that needs no package: one step for all."""
    from transformers.cache_utils import QuantizedLayer

    class Rounding(QuantizedLayer):  # type: ignore[misc]
        def _quantize(self, x: Any, axis: int) -> Any:
            return (x / 0.25).round()

        def _dequantize(self, x: Any) -> Any:
            return x * 0.25

    return Rounding(residual_length=16)


@pytest.mark.parametrize("kind", ["residual", "fp8"])
def test_chunks_read_what_single_tokens_read(
    llama: Any, tokens: np.ndarray, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Cache
    from transformers.cache_utils import Fp8QuantizedLayer

    caches = script("lab.quantized_caches")
    monkeypatch.setattr(caches, "PROMPT", 20)
    monkeypatch.setattr(caches, "RESIDUAL", 16)
    layer = rounding_layer if kind == "residual" else Fp8QuantizedLayer
    setting = SimpleNamespace(cache=lambda config: Cache(layers=[layer() for _ in range(config.num_hidden_layers)]))
    made = caches.reader(llama, setting)(tokens)
    by_token, dense = (one_by_one(llama, tokens, each, prompt=20) for each in (layer, dense_layer))
    np.testing.assert_allclose(made, by_token, atol=2e-3)
    assert np.abs(made - dense)[:, :20].max() < 1e-3
    assert np.abs(made - dense)[:, 20:].max() > 0.02


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the library's own making
def test_quantos_bytes_by_hand(llama: Any) -> None:
    """Half a byte a number and two numbers of bfloat16 for each 64; after 512 tokens 64 are in bfloat16."""
    pytest.importorskip("optimum.quanto")
    caches = script("lab.quantized_caches")
    setting = caches.Setting("quanto", {"backend": "quanto", "nbits": 4})
    token = (4 + 2 * 16 / 64) / 16
    found = caches.sizes(llama.config, setting, 512)
    assert found == pytest.approx({"token": token, "sequence": (448 * token + 64) / 512})


def test_turboquants_error_is_its_papers(torch: ModuleType) -> None:
    """Of unit vectors: 0.117, 0.03 and 0.009 with 2, 3 and 4 bits (arXiv 2504.19874, theorem 1)."""
    others = script("lab.settings_of_others")
    x = torch.nn.functional.normalize(torch.randn(4000, 64, generator=torch.Generator().manual_seed(1)), dim=-1)
    errors = [float(((x - others.gaussian(x, bits)) ** 2).sum(-1).mean()) for bits in (2, 3, 4)]
    np.testing.assert_allclose(errors, [0.117, 0.0345, 0.0095], rtol=0.06)
    np.testing.assert_allclose(others.gaussian(10 * x, 3), 10 * others.gaussian(x, 3), rtol=0.02, atol=0.02)


def test_bytes_of_settings_by_hand(torch: ModuleType) -> None:
    others = script("lab.settings_of_others")
    assert others.kivi(4, 128).sizes(64, 512) == pytest.approx(
        {"token": 5 / 16, "sequence": (5 * 896 + 16 * 128) / 16384}
    )
    assert others.turboquant(4).sizes(64, 512) == pytest.approx({"token": 4.25 / 16, "sequence": 4.25 / 16})
    assert others.turboquant(2.5).sizes(64, 512)["token"] == pytest.approx(3 / 16)
    sinks = others.turboquant(3, sinks=4).sizes(64, 512)["sequence"]
    assert sinks == pytest.approx((3.25 * 508 + 16 * 4) / 16 / 512)


def test_rows_are_means_over_windows(tmp_path: Path) -> None:
    rivals = script("rivals")
    seen = [{"cache": "a", "token": 0.5, "sequence": 0.6, "kl": kl, "rise": 0.1, "loss": 2.0} for kl in (0.2, 0.4, 0.6)]
    (row,) = rivals.table([[one] for one in seen])
    error = 0.2 / 3**0.5
    assert row["kl"] == pytest.approx([0.4, 0.4 - 1.959964 * error, 0.4 + 1.959964 * error])
    assert row["perplexity_change"] == pytest.approx([100 * np.expm1(0.1)] * 3)
    assert (row["n"], row["dense_perplexity"]) == (3, pytest.approx(np.exp(2)))


def test_missing_packages_and_files_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals = script("rivals")
    monkeypatch.setattr(rivals, "installed", lambda package: package == "torch")
    options = rivals.RivalsOptions(("m",), rivals="transformers")
    with pytest.raises(InputError, match=r"^optimum.quanto, hqq cannot be imported; expected what rows of"):
        _ = options.groups
    monkeypatch.setattr(rivals, "installed", lambda package: True)
    with pytest.raises(InputError, match="need --gguf FILE"):
        _ = rivals.RivalsOptions(("m",), rivals="llama.cpp").groups
    with pytest.raises(InputError, match="--rivals"):
        _ = rivals.RivalsOptions(("m",), rivals="everything").groups
    assert rivals.RivalsOptions(("m",), rivals="ours").groups == ("ours",)


def test_a_window_is_measured_once(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours on a toy, in two calls, the second of which asks for a window more."""
    rivals = script("rivals")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(["good", "bad", "film", "very"], 200)))
    settings = {"text": text, "rivals": "ours", "storages": "int8,k4v3", "window": 16, "out": tmp_path / "out"}
    measured: list[np.ndarray] = []
    before = rivals.measured

    def counted(*args: Any) -> Any:
        measured.append(args[-1])
        return before(*args)

    monkeypatch.setattr(rivals, "measured", counted)
    for windows in (2, 3):
        rivals.rivals(rivals.RivalsOptions((str(small_model),), windows=windows, seeds="0", **settings))
    assert len(measured) == 3
    rows = json.loads((tmp_path / "out/rivals.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["cache"], row["n"]) for row in rows] == [("int8", 3), ("k4v3", 3)]
    assert rows[0]["kl"][0] > 0
