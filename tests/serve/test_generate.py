"""Generation is the uncached model asked again and again; batches, padding, pieces and buckets change nothing."""

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import with_storage
from chai_jax.errors import InputError
from chai_jax.files.store import load
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import fold_projections, init
from chai_jax.model.quantized import quantize_int8
from chai_jax.model.sharding import Layout, make_mesh, one_device
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.plans.spec import Spec
from chai_jax.serve import decode as serve
from chai_jax.serve import generate as texts
from chai_jax.serve.decode import bucket
from chai_jax.serve.generate import generate, generate_tokens, stream, warm_up
from chai_jax.serve.sample import Sampling

BYTES = 4  # the first token that stands for a byte
CONFIG = Architecture(
    vocab_size=BYTES + 256, hidden_size=32, num_layers=2, num_heads=4, ffn_dim=64, max_positions=80, embed_dim=32
)
ONE = Execution.choose(layout=one_device())
PROMPTS = ([2, 70, 80, 90], [2], [2, 101, 102], [2, *range(50, 74)], [2, 250, 251, 252, 253])


class ByteTokenizer:
    """One token per byte of UTF-8, as the slowest byte-level BPE, and `</s>` first."""

    bos_token = eos_token = "</s>"
    bos_token_id = eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not verbose
        return {"input_ids": [*[2] * add_special_tokens, *(BYTES + byte for byte in text.encode())]}

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(token - BYTES for token in tokens if token >= BYTES).decode(errors="replace")


@pytest.fixture(scope="module")
def model() -> Model:
    """Random, with embeddings large enough that the text goes somewhere."""
    spec = Spec.dense(2, 4, 8)
    params = init(CONFIG, spec, jax.random.key(0), std=0.2)
    return Model(CONFIG, spec, params, ByteTokenizer())


def naive(model: Model, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each by a forward pass over all tokens so far (padded on the right to one shape)."""
    columns = -(-(len(prompt) + count) // 48) * 48
    tokens = np.full((1, columns), 1, np.int32)
    tokens[0, : len(prompt)] = prompt
    length = len(prompt)
    for _ in range(count):
        logits = model(tokens, np.arange(columns)[None] < length)
        tokens[0, length] = int(jnp.argmax(logits[0, length - 1]))
        length += 1
    return [int(token) for token in tokens[0, len(prompt) : length]]


@pytest.mark.as_user
def test_a_ragged_batch_equals_uncached_greedy_decoding_prompt_by_prompt(model: Model) -> None:
    found = generate_tokens(model, PROMPTS, max_new_tokens=12, stop=False)
    assert found == [naive(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in found}) == len(PROMPTS)


@pytest.mark.slow
def test_long_prompts_are_read_a_few_at_a_time(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four at once: the same text, and nothing of four rows before the vocabulary head."""
    tokens, mask = map(jnp.asarray, serve.pad_right(PROMPTS[:4], 1))
    keys = jax.random.split(jax.random.key(0), 4)
    rest = (model.params, tokens, mask, keys, Sampling(), jnp.int32(serve.NEVER))
    read = partial(serve.prefill.__wrapped__, model.config, model.spec, capacity=48, how=ONE)
    together = read(*rest)
    monkeypatch.setattr(serve, "most_rows", lambda length: 3)
    apart = read(*rest)
    np.testing.assert_array_equal(apart.tokens, together.tokens)
    real = np.pad(mask, ((0, 0), (0, 16)))[:, None, :, None]
    same = partial(np.testing.assert_allclose, atol=1e-5)
    layers = (jax.tree.map(np.asarray, state.cache.layers) for state in (apart, together))
    jax.tree.map(lambda one, two: same(one * real, two * real), *layers)
    np.testing.assert_array_equal(apart.cache.mask, together.cache.mask)
    assert apart.cache.length.tolist() == together.cache.length.tolist() == [*map(len, PROMPTS[:4])]
    program = str(jax.make_jaxpr(read)(*rest))
    assert "f32[2,32,64]" in program
    assert "f32[4,32,64]" not in program


@pytest.mark.slow
def test_a_mesh_gives_the_same(model: Model) -> None:
    """Five prompts in eight rows, split; and one prompt, which is not."""
    expected = {count: generate_tokens(model, PROMPTS[:count], 6, stop=False) for count in (1, 5)}
    split = model.replace(execution=Execution.choose(layout=Layout(make_mesh(4, 2), fsdp=True)))
    for count, tokens in expected.items():
        assert generate_tokens(split, PROMPTS[:count], 6, stop=False) == tokens


@pytest.mark.parametrize("storage", ["int8", pytest.param("int4", marks=pytest.mark.slow), "k4v3"])
def test_the_cache_is_split_over_sequences_and_heads(model: Model, storage: str) -> None:
    layout = Layout(make_mesh(4, 2))
    stored = with_storage(model, storage)
    tokens, mask = serve.pad_right(PROMPTS, CONFIG.pad_token_id, 4)
    what = (CONFIG, stored.spec, layout.params(CONFIG, stored.spec, model.params))
    rule = (Sampling(), jnp.int32(serve.NEVER))
    keys = jax.random.split(jax.random.key(0), len(tokens))
    how = Execution.choose(layout=layout)
    state = serve.prefill(*what, *layout.rows((tokens, mask)), keys, *rule, capacity=64, how=how)
    for _ in range(2):
        for leaf in jax.tree.leaves(state.cache.layers):
            expected = jax.NamedSharding(layout.mesh, PartitionSpec("data", "model"))
            assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
        state = serve.decode(*what, state, jnp.int32(9), *rule, how=how)


@pytest.mark.as_user
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_attention_reads_what_the_cache_stores(model: Model, storage: str) -> None:
    stored = with_storage(model, storage)
    assert generate_tokens(stored, PROMPTS[:2], 12, stop=False) == [naive(stored, p, 12) for p in PROMPTS[:2]]


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int4", "k3v3"])
def test_caches_of_blocks_fill_them_while_decoding(model: Model, storage: str) -> None:
    """The uncached model says the same token by token, of each prompt alone."""
    stored = with_storage(model, storage)
    prompts = [list(range(4, 4 + length)) for length in (20, 26)]
    assert generate_tokens(stored, prompts, 40, stop=False) == [naive(stored, prompt, 40) for prompt in prompts]


@pytest.mark.as_user
def test_quantized_and_half_precision_weights_give_what_the_forward_pass_gives(model: Model) -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), model.params)
    params["layers"]["0"]["up"]["kernel"] = quantize_int8(params["layers"]["0"]["up"]["kernel"], (-2,))
    params["layers"]["1"]["output"]["kernel"] = quantize_int8(params["layers"]["1"]["output"]["kernel"], (-3, -2))
    small = model.replace(params=params)
    assert generate_tokens(small, PROMPTS[:1], 12, stop=False) == [naive(small, PROMPTS[0], 12)]


def test_matches_transformers_token_for_token(torch: ModuleType, tmp_path: Path) -> None:
    from transformers import OPTConfig as TorchConfig
    from transformers import OPTForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 16}
    sizes = {"vocab_size": 96, "max_position_embeddings": 64, "num_hidden_layers": 2, "init_std": 0.2}
    config = TorchConfig(**shape, **sizes, do_layer_norm_before=False, dropout=0.0)
    module = OPTForCausalLM(config).eval()
    module.generation_config.eos_token_id = None
    module.save_pretrained(tmp_path)
    ours = load(tmp_path)
    prompts = [[2, 10, 20], [2, 5, 6, 7, 8, 9]]
    for prompt, found in zip(prompts, generate_tokens(ours, prompts, 16, stop=False), strict=True):
        expected = module.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
        assert found == expected[0, len(prompt) :].tolist()


@pytest.mark.as_user(alone=True)
def test_texts_are_those_of_transformers(torch: ModuleType, shared: Path) -> None:
    """Of a trained model, whose matrices are as large as a user's, each prompt alone and all in one batch."""
    from transformers import AutoTokenizer, OPTForCausalLM

    folder = shared / "models" / "opt-mini"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    module = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = ["The capital of France is", "a gorgeous , witty film", "In 1914 the war"]
    expected = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        made = module.generate(**given, max_new_tokens=24, do_sample=False)[0, given["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(made, skip_special_tokens=True))
    ours = load(folder, dtype="float32")
    assert generate(ours, prompts, max_new_tokens=24) == expected
    assert [generate(ours, [prompt], max_new_tokens=24)[0] for prompt in prompts] == expected
    assert len(set(expected)) == 3


def test_each_sequence_stops_at_its_own_end(model: Model) -> None:
    free = generate_tokens(model, PROMPTS, 12, stop=False)
    end = free[0][3]
    stopping = model.replace(config=dataclasses.replace(model.config, eos_token_id=end))
    found = generate_tokens(stopping, PROMPTS, 12)
    assert found == [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len(found[0]) <= 4
    assert max(map(len, found)) == 12


def test_a_stopped_sequence_adds_nothing_and_the_loop_ends_with_the_last(model: Model) -> None:
    free = generate_tokens(model, PROMPTS[:2], 12, stop=False)
    tokens, mask = serve.pad_right(PROMPTS[:2], 1)
    keys, greedy = jax.random.split(jax.random.key(0), 2), serve.Sampling.checked()

    def run(eos: int) -> serve.Decoding:
        rule = greedy, jnp.int32(eos)
        what = CONFIG, model.spec, model.params
        state = serve.prefill(*what, tokens, mask, keys, *rule, capacity=32, how=ONE)
        return serve.decode(*what, state, jnp.int32(12), *rule, how=ONE)

    end = next(token for token in free[0][1:6] if token not in free[1])
    at = free[0].index(end) + 1
    state = run(end)
    assert np.asarray(state.done).tolist() == [True, False]
    lengths = [len(prompt) for prompt in PROMPTS[:2]]
    made = [row[length : length + 12].tolist() for row, length in zip(np.asarray(state.tokens), lengths, strict=True)]
    assert made == [free[0][:at] + [1] * (12 - at), free[1]]
    assert state.cache.length.tolist() == [lengths[0] + at - 1, lengths[1] + 11]
    assert np.asarray(state.cache.mask).sum(axis=1).tolist() == state.cache.length.tolist()

    alone = model.replace(config=dataclasses.replace(model.config, eos_token_id=end))
    assert generate_tokens(alone, PROMPTS[:1], 12) == [free[0][:at]]
    mask[1] = False
    state = run(end)
    assert np.asarray(state.done).all()
    assert int(state.made) == at


@pytest.mark.slow
def test_sampling_follows_the_seed_and_the_prompts_number_alone(model: Model) -> None:
    def drawn(batch_size: int, seed: int, prompts: tuple[list[int], ...] = PROMPTS) -> list[list[int]]:
        return generate_tokens(model, prompts, 8, 1.5, top_k=50, seed=seed, stop=False, batch_size=batch_size)

    whole = drawn(8, seed=0)
    assert drawn(2, seed=0) == whole
    assert drawn(8, seed=0, prompts=PROMPTS[:3]) == whole[:3]
    assert drawn(8, seed=1) != whole
    assert drawn(8, seed=2**32 - 1) != whole
    assert len({tuple(row) for row in drawn(8, 0, ([2, 70],) * 5)}) == 5


def test_mixed_requests_share_a_few_programs(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[Any] = []
    real = serve.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        traces.append(args[3].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(serve, "forward", counted)  # it runs while a program is traced, and never again
    # A configuration of its own, so that no program of the tests before fits.
    fresh = model.replace(config=dataclasses.replace(model.config, pad_token_id=3))
    for rows, length, new in [(3, 5, 4), (4, 14, 9), (3, 9, 16), (4, 2, 1), (3, 16, 11)]:
        generate_tokens(fresh, [[2] * length] * rows, new)
        generate_tokens(fresh, [[2] * length] * rows, new, temperature=0.1 * new)
    assert set(traces) == {(4, 16), (4, 1)}
    assert len(traces) <= 4 * 2  # prefill and decode, greedy and sampled; a while loop may be traced twice


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        pytest.param("float32", "float32", marks=pytest.mark.slow),
        pytest.param("float32", "bfloat16", marks=pytest.mark.slow),
        ("float32", "int8"),
        pytest.param("bfloat16", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_the_cache_is_updated_in_place(rows: int, dtype: str, storage: str) -> None:
    """A decode step neither takes a second cache nor copies the first: what it needs beside is a layer's."""
    layers = 4
    config, spec = dataclasses.replace(CONFIG, num_layers=layers), Spec.dense(layers, 4, 8, storage)
    params = fold_projections(init(config, spec, jax.random.key(0)))
    tokens, mask = serve.pad_right(PROMPTS[:rows], 1)
    keys = jax.random.split(jax.random.key(0), len(tokens))
    rule = serve.Sampling.checked(), jnp.int32(2)
    how = ONE.replace(dtype=jnp.dtype(dtype))
    state = serve.prefill(config, spec, params, tokens, mask, keys, *rule, capacity=2048, how=how)
    program = serve.decode.lower(config, spec, params, state, jnp.int32(9), *rule, how=how).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= state.cache.nbytes
    one_layer = 2 * tokens.shape[0] * 4 * 2048 * 8 * 4  # keys and values in float32
    assert memory.temp_size_in_bytes < 1.5 * one_layer
    before = jax.tree.leaves(state.cache.layers)
    after = program(params, state, jnp.int32(9), *rule)
    assert all(leaf.is_deleted() for leaf in before)
    assert after.cache.length.tolist() == [len(prompt) + 8 for prompt in PROMPTS[:rows]] + [0] * (len(tokens) - rows)


def test_a_second_request_finds_the_parameters_ready(model: Model) -> None:
    fresh = model.replace()
    other, half = ONE.replace(layout=Layout(make_mesh(2, 1))), ONE.replace(dtype=jnp.dtype("bfloat16"))
    ready = serve.serving_params(fresh, ONE)
    assert serve.serving_params(fresh, Execution.choose(layout=one_device())) is ready
    assert serve.serving_params(fresh, half)["layers"]["0"]["up"]["kernel"].dtype == "bfloat16"
    assert "qkv" in ready["layers"]["0"]
    assert serve.serving_params(fresh, ONE)["layers"]["0"]["up"]["kernel"].dtype == "float32"
    assert "query" in serve.serving_params(fresh, other)["layers"]["0"]  # split kernels are not folded
    kept = weakref.ref(fresh)
    del fresh, ready
    gc.collect()
    assert kept() is None


def test_the_model_stays_usable(model: Model) -> None:
    before = model(np.array([PROMPTS[0]], np.int32))
    generate_tokens(model, PROMPTS, 4)
    np.testing.assert_array_equal(model(np.array([PROMPTS[0]], np.int32)), before)


def test_generate_returns_completions_alone(model: Model) -> None:
    texts = generate(model, ["abc", "", "</s>"], max_new_tokens=6)
    tokens = generate_tokens(model, [[2, BYTES + 97, BYTES + 98, BYTES + 99], [2]], 6)
    assert texts[:2] == [model.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    assert generate(model, []) == []


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "top_p": 0.95}])
def test_streamed_pieces_make_up_the_text(model: Model, sampling: dict[str, float]) -> None:
    (text,) = generate(model, ["abc"], max_new_tokens=30, seed=3, **sampling)
    pieces = list(stream(model, "abc", max_new_tokens=30, seed=3, **sampling))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert all(pieces)
    heard: list[str] = []
    assert generate(model, ["abc"], max_new_tokens=30, seed=3, on_text=heard.append, **sampling) == [text]
    assert heard == pieces


def test_a_character_is_streamed_whole(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [BYTES + byte for byte in "né€😀".encode()]

    def one_by_one(*args: Any, **kwargs: Any) -> Iterator[list[list[int]]]:
        yield from ([made[:count]] for count in range(1, len(made) + 1))

    monkeypatch.setattr(texts, "_continue", one_by_one)
    assert list(stream(model, "x")) == ["n", "é", "€", "😀"]


@pytest.mark.parametrize("count", [1, 16, 17, 100, 128, 129, 500, 545, 2048])
def test_buckets_hold_their_content_and_waste_little(count: int) -> None:
    size = bucket(count)
    assert count <= size <= max(count + 15, 1.25 * count)
    assert bucket(size) == size


def test_there_are_few_buckets() -> None:
    assert len({bucket(count) for count in range(1, 2049)}) == 24


def test_after_a_warm_up_no_request_compiles_anything(caplog: pytest.LogCaptureFixture) -> None:
    spec = Spec.dense(2, 4, 8, "bfloat16")  # no other test's, so that nothing is compiled yet
    model = Model(CONFIG, spec, init(CONFIG, spec, jax.random.key(0), std=0.2), ByteTokenizer())

    def compiled() -> list[str]:
        found = [record.getMessage() for record in caplog.records if "XLA compilation" in record.getMessage()]
        caplog.clear()
        return found

    with jax.log_compiles():
        shapes = warm_up(model, batch_sizes=(1, 3), longest=16, max_new_tokens=20)
        # Greedy and drawn, prompts of 16 columns, and room for 1 to 16 or for 17 to 20 more; in one row and in four.
        assert shapes == 2 * 2
        assert sum("jit(prefill)" in line for line in compiled()) == 2 * shapes
        random = np.random.default_rng(0)
        settings = [{}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.5}]
        for number in range(12):
            rows = int(random.choice([1, 3, 4]))
            prompts = [random.integers(4, 260, random.integers(1, 17)).tolist() for _ in range(rows)]
            generate_tokens(model, prompts, int(random.integers(1, 21)), seed=number, **settings[number % 4])
        assert "".join(stream(model, "abc", max_new_tokens=19)) == generate(model, ["abc"], max_new_tokens=19)[0]
        assert compiled() == []
    with pytest.raises(InputError, match="at least 1"):
        warm_up(model, batch_sizes=())
    with pytest.raises(InputError, match="positions"):
        warm_up(model, longest=79)


@pytest.mark.parametrize(
    ("prompts", "asked", "message"),
    [
        ([[2] * 70], {"max_new_tokens": 12}, "prompt 0 has 70 tokens; 12 new ones do not fit the model's 80 positions"),
        ([[2], []], {}, "prompt 1 has no tokens"),
        ([[2, 260]], {}, "outside 0 to 259"),
        ([[2, -1]], {}, "outside 0 to 259"),
        ([[2]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[2]], {"top_p": 0.5}, "greedy"),
        ([[2]], {"seed": -1}, "seed is -1; expected 0 to 4294967295"),
        ([[2]], {"seed": 2**32}, "seed is 4294967296; expected 0 to 4294967295"),
    ],
)
def test_refuses_what_cannot_be(model: Model, prompts: list[list[int]], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate_tokens(model, prompts, **asked)


def test_the_longest_completion_that_fits_is_made(model: Model) -> None:
    (found,) = generate_tokens(model, [[2] * 70], max_new_tokens=11, stop=False)
    assert len(found) == 11


def test_refuses_texts_it_cannot_read(model: Model) -> None:
    with pytest.raises(InputError, match=r"write \[prompt\]"):
        generate(model, "abc")
    with pytest.raises(InputError, match="no tokenizer"):
        generate(model.replace(tokenizer=None), ["abc"])
    with pytest.raises(InputError, match="on_text with 2 prompts"):
        generate(model, ["a", "b"], on_text=print)


@pytest.mark.parametrize("storage", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_each_prompt_has_its_own_clusters_or_for_good_the_calibrated_ones(model: Model, storage: str) -> None:
    clusters = ClusterPlan((0, 2), 2, storage=storage), ClusterPlan((1, 3), 1, storage=storage)
    plan = Plan((LayerPlan(clusters),) * 2, "qk", warmup_tokens=5)
    dense = with_storage(model, storage)
    fixed, found = cluster(dense, plan), cluster(dense, dataclasses.replace(plan, membership="prompt"))
    assert sum(len(prompt) < 5 for prompt in PROMPTS) == 3
    expected = [naive(found if len(prompt) >= 5 else fixed, prompt, 10) for prompt in PROMPTS]
    assert generate_tokens(found, PROMPTS, 10, stop=False) == expected
    assert expected != [naive(fixed, prompt, 10) for prompt in PROMPTS]
    assert expected != [naive(found, prompt, 10) for prompt in PROMPTS]
