"""A draft changes how fast tokens come, never which (greedy) nor how they are distributed (sampled)."""

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import with_storage
from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.plans.spec import Spec
from chai_jax.serve import speculate as module
from chai_jax.serve.generate import generate_tokens
from chai_jax.serve.speculate import judge, speculate

CONFIG = Architecture(
    vocab_size=48, hidden_size=32, num_layers=2, num_heads=4, ffn_dim=64, max_positions=80, embed_dim=32
)
PROMPTS = ([2, 7, 8, 9], [2], [2, *range(10, 24)])


def random_model(seed: int, layers: int = 2) -> Model:
    config, spec = dataclasses.replace(CONFIG, num_layers=layers), Spec.dense(layers, 4, 8)
    return Model(config, spec, init(config, spec, jax.random.key(seed), std=0.2))


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(0)


@pytest.fixture(scope="module")
def drafts(model: Model) -> dict[str, Model]:
    layer = LayerPlan((ClusterPlan((0, 1), 0), ClusterPlan((2,), 2), ClusterPlan((3,), 3)))
    return {
        "itself": model,
        "clustered": with_storage(cluster(model, Plan((layer,) * 2, "qkv")), "int8"),
        "another": random_model(5, layers=1),
    }


@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param("itself", 4, marks=pytest.mark.slow),
        ("clustered", 4),
        pytest.param("clustered", 1, marks=pytest.mark.slow),
        pytest.param("another", 4, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_are_the_models_own(model: Model, drafts: dict[str, Model], name: str, count: int) -> None:
    for prompt in PROMPTS:
        (expected,) = generate_tokens(model, [prompt], 21, stop=False)
        *_, found = speculate(model, drafts[name], prompt, 21, stop=False, count=count, piece=6)
        assert found.tokens == expected
        assert found.proposed == found.rounds * count
        assert found.rounds + found.kept >= 20  # each round adds one token, and those that were kept
        if name == "itself":
            assert (found.acceptance, found.rounds) == (1.0, -(-20 // (count + 1)))
        else:
            assert 0 <= found.kept < found.proposed


@pytest.mark.slow
def test_an_int8_model_is_decoded_as_by_itself(model: Model, drafts: dict[str, Model]) -> None:
    stored = with_storage(model, "int8")
    (expected,) = generate_tokens(stored, PROMPTS[:1], 21, stop=False)
    *_, found = speculate(stored, drafts["another"], PROMPTS[0], 21, stop=False)
    assert found.tokens == expected


def test_a_text_ends_where_the_models_own_does(model: Model, drafts: dict[str, Model]) -> None:
    (free,) = generate_tokens(model, PROMPTS[:1], 21, stop=False)
    at = next(at for at in range(6, 0, -1) if free[at] not in free[:at])
    ends = model.replace(config=dataclasses.replace(model.config, eos_token_id=free[at]))
    *_, found = speculate(ends, drafts["clustered"], PROMPTS[0], 21)
    assert found.tokens == free[: at + 1]


def test_pieces_grow_to_the_whole(model: Model, drafts: dict[str, Model]) -> None:
    pieces = [found.tokens for found in speculate(model, drafts["clustered"], PROMPTS[0], 21, stop=False, piece=4)]
    assert len(pieces) > 3
    assert all(new[: len(old)] == old and len(new) > len(old) for old, new in itertools.pairwise(pieces))
    assert len(pieces[-1]) == 21


P = np.array([[0.5, 0.3, 0.0, 0.2], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.5, 0.0]])
Q = np.array([[0.2, 0.3, 0.4, 0.1], [0.4, 0.3, 0.2, 0.1]])
DRAWS = 20_000


def test_what_is_kept_or_redrawn_follows_the_models_distribution() -> None:
    def once(key: Any) -> tuple[Any, Any, Any]:
        drawing, judging = jax.random.split(key)
        proposed = jax.random.categorical(drawing, jnp.log(Q)).astype(jnp.int32)
        kept, follows = judge(proposed, jnp.log(Q), jnp.log(P), judging)
        return proposed, kept, follows

    with np.errstate(divide="ignore"):
        proposed, kept, follows = map(np.asarray, jax.vmap(once)(jax.random.split(jax.random.key(0), DRAWS)))
    first = np.where(kept > 0, proposed[:, 0], follows)
    second = np.where(kept > 1, proposed[:, 1], follows)[kept > 0]
    third = follows[kept > 1]
    for tokens, p in zip((first, second, third), P, strict=True):
        counts = np.bincount(tokens, minlength=4)
        assert not counts[p == 0].any()
        assert chisquare(counts[p > 0], len(tokens) * p[p > 0]).pvalue > 0.001
    # The chance of keeping a proposal is what the two distributions share.
    shared = np.minimum(P[0], Q[0]).sum()
    assert abs((kept > 0).mean() - shared) < 4 * np.sqrt(shared * (1 - shared) / DRAWS)


@pytest.mark.slow
def test_sampling_follows_the_seed_and_every_proposal_of_the_model_itself_is_kept(
    model: Model, drafts: dict[str, Model]
) -> None:
    def drawn(seed: int, draft: str = "clustered") -> Any:
        *_, found = speculate(model, drafts[draft], PROMPTS[0], 12, 1.2, top_k=20, seed=seed, stop=False)
        return found

    assert drawn(0).tokens == drawn(0).tokens
    assert drawn(0).tokens != drawn(1).tokens
    assert drawn(0, "itself").acceptance == 1.0


def test_requests_share_a_program(model: Model, drafts: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[Any] = []
    real = module.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        traces.append(args[3].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "forward", counted)
    fresh = model.replace(config=dataclasses.replace(model.config, pad_token_id=3))
    ask = partial(speculate, fresh, drafts["clustered"], count=3, stop=False)
    for length, new in [(5, 4), (14, 9), (9, 12)]:
        list(ask([2] * length, new))
    assert set(traces) == {(1, 4), (1, 1)}
    assert len(traces) <= 4  # a while loop may be traced twice


def test_what_cannot_be_done_is_said(model: Model, drafts: dict[str, Model]) -> None:
    small = dataclasses.replace(CONFIG, vocab_size=40)
    spec = Spec.dense(2, 4, 8)
    for options, told in (
        ({"count": 0}, "proposes? 0|0 tokens a round"),
        ({"draft": with_storage(model, "int4")}, "a cache of blocks .* cannot take tokens back"),
        ({"draft": Model(small, spec, init(small, spec, jax.random.key(0)))}, "the model has 48 tokens, the draft 40"),
        ({"max_new_tokens": 80}, "do not fit"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(InputError, match=told):
            next(speculate(**{"model": model, "draft": drafts["another"], "prompt": [2, 5], **options}))
