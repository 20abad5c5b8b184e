"""What is timed in other frameworks is the same computation: equal tokens, equal log-probabilities."""

import dataclasses
import importlib.util
from types import ModuleType

import jax
import numpy as np
import pytest

from chai_jax.bench import peers
from chai_jax.bench.peers import PEERS, check_peer, stay_awake
from chai_jax.bench.race import Shape, Timed
from chai_jax.bench.sweep import peer
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import with_storage
from chai_jax.errors import InputError
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture, Rotary
from chai_jax.plans.planned import uniform_plan
from chai_jax.plans.spec import Spec

SHAPE = Shape(batch=3, prompt=9, new_tokens=6, question=11)
PRE = Architecture(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, ffn_dim=64, max_positions=48, embed_dim=32)
POST = Architecture(64, 32, 2, 4, 64, 48, embed_dim=16, pre_norm=False)  # as opt-350m
LLAMA = dataclasses.replace(
    PRE, num_kv_heads=2, norm="rms", gated=True, bias=False, activation="silu", rotary=Rotary(), position_offset=0,
    family="llama",
)  # fmt: skip
MISTRAL = dataclasses.replace(LLAMA, tied=False, windows=(7, 7), family="mistral")
PYTHIA = dataclasses.replace(
    PRE, parallel=True, activation="gelu", rotary=Rotary(fraction=0.25), position_offset=0, tied=False,
    bos_token_id=0, eos_token_id=0, pad_token_id=0, family="gpt_neox",
)  # fmt: skip
GPT2 = dataclasses.replace(PRE, vocab_size=61, activation="gelu_new", position_offset=0, family="gpt2")
CONFIGS = {"pre": PRE, "post": POST, "clustered": PRE, "llama": LLAMA, "gpt2": GPT2, "grouped": LLAMA}
ONLY_HF = {"mistral": MISTRAL, "pythia": PYTHIA}  # CTranslate2's converter knows no such windows, nor today's names
CASES = [*((kind, name) for kind in PEERS for name in CONFIGS), *(("hf", name) for name in ONLY_HF)]


def random_model(config: Architecture) -> Model:
    spec = Spec.of(config)
    return Model(config, spec, init(config, spec, jax.random.key(1), 0.3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries' own making
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_peer_computes_what_we_compute(kind: str, name: str, torch: ModuleType) -> None:
    for library in PEERS[kind].libraries:
        pytest.importorskip(library)
    model = random_model({**CONFIGS, **ONLY_HF}[name])
    if name in ("clustered", "grouped"):
        model = cluster(model, uniform_plan(model.config, "qkv", 0.5, "float32"))
    ours, theirs = Timed(model, SHAPE, seed=3), PEERS[kind](model, threads=1)(SHAPE, 3)
    for _ in range(2):  # a second run starts anew
        *times, tokens = theirs.generate()
        assert np.asarray(tokens).tolist() == np.asarray(ours.generate()[2]).tolist()
        assert min(times) > 0
    assert np.asarray(tokens).shape == (3, 7)
    assert len(np.unique(np.asarray(tokens))) > 3  # not one token over and over, whatever was read
    milliseconds, logprobs = theirs.score()
    np.testing.assert_allclose(np.asarray(logprobs), np.asarray(ours.score()[1]), atol=1e-4)
    assert milliseconds > 0


def test_bytes_are_those_of_the_peers_arrays(torch: ModuleType) -> None:
    model = random_model(PRE)
    peer = PEERS["hf"](model, threads=1)(SHAPE, 0)
    peer.generate()
    assert peer.bytes == {"weights": model.nbytes, "kv": 3 * (9 + 6) * 2 * 2 * 32 * 4}


def test_peers_compute_in_our_dtype(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(PRE).replace(execution=Execution.choose("bfloat16"))
    peer = PEERS["hf"](model, threads=1)(SHAPE, 0)
    peer.generate()
    assert peer.bytes == {"weights": model.nbytes // 2, "kv": 3 * (9 + 6) * 2 * 2 * 32 * 2}
    library = pytest.importorskip("ctranslate2")
    monkeypatch.setattr(library, "get_supported_compute_types", lambda device: {"float32"})
    with pytest.raises(InputError, match="does not compute in bfloat16 on this CPU"):
        PEERS["ctranslate2"](model, threads=1)


def test_threads_are_the_ones_asked_for(torch: ModuleType) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            PEERS["hf"](random_model(PRE), threads)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_threads_stay_awake_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.os, "environ", {"GOMP_SPINCOUNT": "7"})
    for platform, expected in (
        ("darwin", {"GOMP_SPINCOUNT": "7"}),
        ("linux", {"GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": "active"}),
    ):
        monkeypatch.setattr(peers.sys, "platform", platform)
        stay_awake()
        assert peers.os.environ == expected


def test_refuses_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--peer vllm is unknown; expected one of hf, ctranslate2"):
        check_peer("vllm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--peer hf needs torch, which is not installed"):
        check_peer("hf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_peer("hf")
    monkeypatch.setattr(peers.jax, "default_backend", lambda: "gpu")
    with pytest.raises(InputError, match="computes on the CPU, JAX here on gpu"):
        check_peer("hf")


def test_ctranslate2_wants_a_vocabulary_of_eights(torch: ModuleType) -> None:
    pytest.importorskip("ctranslate2")
    with pytest.raises(InputError, match="has 60 tokens"):
        PEERS["ctranslate2"](random_model(Architecture(60, 32, 2, 4, 64, 48, 32)), 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("config", "why"),
    [
        (dataclasses.replace(LLAMA, rotary=Rotary(scaling="dynamic", numbers=(("factor", 2.0),))), "NotImplemented"),
        (dataclasses.replace(LLAMA, head_size=12), "ValueError"),
        (
            dataclasses.replace(MISTRAL, family="qwen2", bias=("query", "key", "value")),
            "it knows none of their windows",
        ),
    ],
)
def test_ctranslate2_refuses_what_it_does_not_know(config: Architecture, why: str, torch: ModuleType) -> None:
    pytest.importorskip("ctranslate2")
    with pytest.raises(InputError, match=f"CTranslate2 does not run such a .* as we do \\({why}"):
        PEERS["ctranslate2"](random_model(config), 1)


def test_other_log_probabilities_are_another_model() -> None:
    """Rounding is none; one token's worth is."""
    model, expected = random_model(PRE), np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    peers._check_same(model, expected + 1e-4, expected)
    for wrong in (np.roll(expected, 1, axis=0), np.where(np.arange(8)[:, None] == 7, 0, expected), expected * np.nan):
        with pytest.raises(InputError, match="away from torch's"):
            peers._check_same(model, wrong, expected)


@pytest.mark.parametrize(
    ("begin", "end", "expected"), [(2, 3, ("2", "3")), (None, (5, 7), ("1", "5")), (0, None, ("0", "1"))]
)
def test_special_tokens_are_tokens_of_the_vocabulary(
    begin: int | None, end: int | tuple[int, ...] | None, expected: tuple[str, str]
) -> None:
    config = dataclasses.replace(PRE, bos_token_id=begin, eos_token_id=end)
    tokenizer = peers.Numbers(random_model(config))
    assert (tokenizer.bos_token, tokenizer.eos_token) == expected
    assert {*expected, tokenizer.unk_token} <= tokenizer.get_vocab().keys()


def test_a_peer_is_set_against_what_it_computes(torch: ModuleType) -> None:
    """Its floor is that of all heads and a float32 cache, whatever the model was compressed to."""
    small = cluster(random_model(PRE), uniform_plan(PRE, "qkv", 0.5, "int8"))
    entrant = peer("hf", "small", with_storage(small, "int8"), threads=1)
    assert entrant.facts() == {
        "model": "hf small",
        "framework": "transformers",
        "layers": 2,
        "clustered_layers": 0,
        "heads": 4,
        "clusters": 4.0,
        "kv_bytes_per_token": 2 * 2 * 32 * 4,
    }
