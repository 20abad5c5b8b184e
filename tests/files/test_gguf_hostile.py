"""GGUF files that are damaged, that lie, or that hold what is not handled: one line each, soon and in little memory."""

import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chai_jax.cli import main
from chai_jax.errors import InputError
from chai_jax.files.gguf.header import read_header
from chai_jax.files.store import load, read_architecture

pytest.importorskip("gguf")

U32, F32, BOOL, TEXT, LIST, U64 = 4, 6, 7, 8, 9, 10
Pairs = dict[str, tuple[int, Any]]
Tensors = dict[str, np.ndarray]
VALUES = {U32: "<I", F32: "<f", BOOL: "<?", U64: "<Q"}


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind: int, given: Any) -> bytes:
    """A value behind its type; of a list (type of its entries, entries)."""
    if isinstance(given, bytes):
        return struct.pack("<I", kind) + given
    if kind == LIST:
        inside, entries = given
        packed = b"".join(value(inside, entry)[4:] for entry in entries)
        return struct.pack("<IIQ", kind, inside, len(entries)) + packed
    return struct.pack("<I", kind) + (text(given) if kind == TEXT else struct.pack(VALUES[kind], given))


def pairs() -> Pairs:
    """The metadata of a Llama of one layer."""
    sizes = {"context_length": 16, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8}
    words = ["<unk>", "<s>", "</s>", *"abcd", "ab"]
    return {
        "general.architecture": (TEXT, "llama"),
        **{f"llama.{name}": (U32, size) for name, size in sizes.items()},
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "tokenizer.ggml.model": (TEXT, "llama"),
        "tokenizer.ggml.tokens": (LIST, (TEXT, words)),
        "tokenizer.ggml.scores": (LIST, (F32, [-1.0] * 8)),
        "tokenizer.ggml.token_type": (LIST, (U32, [2, 3, 3, 1, 1, 1, 1, 1])),
    }


def tensors() -> Tensors:
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    found = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    found |= {"token_embd.weight": (8, 32), "output_norm.weight": (32,)}
    return {name: np.full(shape, 0.1, np.float32) for name, shape in found.items()}


def assemble(
    metadata: Pairs, arrays: Tensors, version: int = 3, counts: tuple[int, int] | None = None, **places: Any
) -> bytes:
    """The bytes of a file.

    Args:
        counts: of tensors and of pairs, as the file says it.
        places: what to say of `token_embd.weight` in place of what is true: `axes`, `shape`, `kind`, `start`.
    """
    header = b"GGUF" + struct.pack("<I2Q", version, *(counts or (len(arrays), len(metadata))))
    header += b"".join(text(key) + value(*pair) for key, pair in metadata.items())
    numbers = b""
    for name, x in arrays.items():
        said = {"shape": x.shape[::-1], "kind": 0, "start": len(numbers), **(places if "token" in name else {})}
        axes = said.get("axes", len(said["shape"]))
        header += text(name) + struct.pack(f"<I{len(said['shape'])}Q", axes, *said["shape"])
        header += struct.pack("<IQ", said["kind"], said["start"])
        numbers += x.tobytes()
    return header + bytes(-len(header) % 32) + numbers


def changed(**metadata: Any) -> bytes:
    """A file with other metadata, None to leave it out; `__` for a dot, `llama_` in front for the architecture's."""
    given = pairs()
    for name, pair in metadata.items():
        key = name.replace("__", ".").replace("words_", "tokenizer.ggml.")
        given.pop(key, None)
        if pair is not None:
            given[key] = pair
    return assemble(given, tensors())


def with_tensors(change: Callable[[Tensors], Any]) -> bytes:
    arrays = tensors()
    change(arrays)
    return assemble(pairs(), arrays)


WHOLE = assemble(pairs(), tensors())
SHORT = "is cut short, or no such file"
FREQS = "rope_freqs.weight"
CASES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "cannot read .*empty"),
    "four bytes": (b"GGUF", SHORT),
    "another file": (b"PK\x03\x04" + WHOLE[4:], r"begins with b'PK\\x03\\x04'; expected a GGUF file"),
    "version 1": (assemble(pairs(), tensors(), version=1), "is GGUF of version 1; expected"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + WHOLE[8:], "is GGUF of version 50331648"),
    "many pairs": (assemble(pairs(), tensors(), counts=(11, 2**63)), "cut short|UTF-8|which there is not"),
    "many tensors": (assemble(pairs(), {}, counts=(2**63, 15)), SHORT),
    "a long key": (b"GGUF" + struct.pack("<I3Q", 3, 0, 1, 2**63), SHORT),
    "a long string": (changed(general__name=(TEXT, struct.pack("<Q", 2**62))), SHORT),
    "a long array": (changed(general__tags=(LIST, struct.pack("<IQ", 0, 2**62))), SHORT),
    "an array of many strings": (changed(general__tags=(LIST, struct.pack("<IQ", 8, 2**40))), SHORT),
    "an array of arrays": (
        changed(general__tags=(LIST, struct.pack("<IQ", 9, 2))),
        "an array 'general.tags' of type 9",
    ),
    "a type that is none": (changed(general__tags=(13, b"")), "has 'general.tags' of type 13, which there is not"),
    "no UTF-8": (changed(general__name=(TEXT, text(b"\xff"))), "holds 'general.name' that is not UTF-8"),
    "a key twice": (
        WHOLE.replace(b"llama.attention.head_count\x04", b"llama.rope.dimension_count\x04"),
        "has 'llama.rope.dimension_count' twice",
    ),
    "a tensor twice": (
        WHOLE.replace(b"ffn_gate", b"attn_v.."[:6] + b"xx").replace(b"attn_vxx", b"ffn_norm"),
        "two tensors",
    ),
    "alignment 0": (changed(general__alignment=(U32, 0)), "has general.alignment 0"),
    "alignment 24": (changed(general__alignment=(U32, 24)), "has general.alignment 24"),
    "one of several files": (changed(split__count=(U32, 3)), "is one of 3 files of a model"),
    "cut numbers": (WHOLE[:-1], r"'output_norm.weight' \[32\] is not in the .* bytes of"),
    "many axes": (assemble(pairs(), tensors(), axes=2**31), "has a tensor 'token_embd.weight' of 2147483648 axes"),
    "a tensor of 2^60": (assemble(pairs(), tensors(), shape=(2**40, 2**20)), "is not in the"),
    "a tensor far away": (assemble(pairs(), tensors(), start=2**63), "is not in the"),
    "one place for two": (assemble(pairs(), tensors(), start=0), r"is not in the .* by itself"),
    "one on another": (assemble(pairs(), tensors(), start=64), "lies on 'blk.0.attn_q.weight'"),
    "a format that is none": (assemble(pairs(), tensors(), kind=999), "has the format 999; expected one of F32, F16"),
    "a format of other numbers": (assemble(pairs(), tensors(), kind=16), "has the format IQ2_XXS; expected one of"),
    "half a block": (assemble(pairs(), tensors(), kind=2, shape=(24, 8)), r"\[8, 24\] in blocks of 32"),
    "no axes": (assemble(pairs(), tensors(), shape=()), r"\[\] in blocks of 1"),
    "not finite": (with_tensors(lambda x: x["output_norm.weight"].fill(np.nan)), "model.gguf holds a NaN"),
    "a scale that is not finite": (
        assemble(pairs(), {**tensors(), "token_embd.weight": np.full(36, 0x7E007E00, "u4")}, kind=2, shape=(32, 8)),
        "model.embed_tokens.weight in model.gguf holds a NaN",
    ),
    "a tensor is missing": (with_tensors(lambda x: x.pop("blk.0.ffn_up.weight")), "the weights lack .*up_proj.weight"),
    "no embedding": (with_tensors(lambda x: x.pop("token_embd.weight")), "has no vocab_size"),
    "a tensor too many": (with_tensors(lambda x: x.update(y=np.ones(3, np.float32))), "model.gguf holds 'y'"),
    "a bias too many": (
        with_tensors(lambda x: x.update({"blk.0.attn_v.bias": np.ones(16, np.float32)})),
        "holds 'model.layers.0.self_attn.v_proj.bias'",
    ),
    "a tensor of another shape": (
        with_tensors(lambda x: x.update({"blk.0.attn_k.weight": np.ones((8, 32), np.float32)})),
        r"k_proj.weight in model.gguf is \[8, 32\]",
    ),
    "no architecture": (
        changed(general__architecture=None),
        "holds a model of architecture None; expected one of llama",
    ),
    "another architecture": (changed(general__architecture=(TEXT, "gemma2")), "of architecture 'gemma2'; expected one"),
    "an architecture that is a number": (changed(general__architecture=(U32, 3)), "holds a model of architecture 3"),
    "an adapter": (changed(general__type=(TEXT, "adapter")), "holds 'adapter' in general.type; expected a model"),
    "no width": (changed(llama__embedding_length=None), "has no llama.embedding_length in its metadata"),
    "a width in words": (changed(llama__embedding_length=(TEXT, "32")), "has hidden_size '32'; expected int"),
    "a width of 2^60": (changed(llama__embedding_length=(U64, 2**60)), "has llama.rope.dimension_count 8, which"),
    "a vocabulary of 2^30": (assemble(pairs(), tensors(), shape=(0, 2**30)), "vocab_size 1073741824; expected 1 to"),
    "no heads": (changed(llama__attention__head_count=(U32, 0)), "num_attention_heads 0; expected 1 to"),
    "a billion layers": (changed(llama__block_count=(U32, 2**30)), "num_hidden_layers 1073741824; expected 1 to"),
    "layers of other heads": (
        changed(llama__attention__head_count_kv=(LIST, (U32, [2, 1]))),
        r"has llama.attention.head_count_kv .*, which is not handled; expected the same in every layer",
    ),
    "values of another size": (changed(llama__attention__value_length=(U32, 4)), "value_length 4, .* expected 8"),
    "half of a head turns": (changed(llama__rope__dimension_count=(U32, 4)), "rope.dimension_count 4, .* expected 8"),
    "experts": (changed(llama__expert_count=(U32, 8)), "has llama.expert_count 8, which is not handled"),
    "a window": (
        changed(llama__attention__sliding_window=(U32, 4)),
        "attention.sliding_window 4, which is not handled",
    ),
    "not causal": (changed(llama__attention__causal=(BOOL, False)), "has llama.attention.causal False"),
    "long factors": (changed(llama__rope__scaling__type=(TEXT, "longrope")), "rope.scaling.type 'longrope'"),
    "yarn's own sharpness": (
        changed(
            llama__rope__scaling__type=(TEXT, "yarn"),
            llama__rope__scaling__factor=(F32, 2.0),
            llama__rope__scaling__yarn_attn_factor=(F32, 1.0),
        ),
        "yarn_attn_factor 1.0, which is not handled",
    ),
    "factors of no Llama": (
        with_tensors(lambda x: x.update({FREQS: np.array([1, 1, 2, 5], np.float32)})),
        "rope_freqs.weight in .* scales the rotary positions as no Llama 3 does",
    ),
    "factors that are not finite": (
        with_tensors(lambda x: x.update({FREQS: np.array([1, 1, 2, np.nan], np.float32)})),
        "as no Llama 3 does",
    ),
    "as many factors as it likes": (with_tensors(lambda x: x.update({FREQS: np.ones(9, np.float32)})), "as no Llama 3"),
    "no rule": (changed(words_model=(TEXT, "gpt2")), "has tokenizer.ggml.pre None; expected one of gpt-2"),
    "an unknown rule": (
        changed(words_model=(TEXT, "gpt2"), words_pre=(TEXT, "viking")),
        "has tokenizer.ggml.pre 'viking'; expected one of gpt-2, smollm",
    ),
    "no merges": (
        changed(words_model=(TEXT, "gpt2"), words_pre=(TEXT, "gpt-2")),
        "has tokenizer.ggml.merges None; expected at most",
    ),
    "half a merge": (
        changed(words_model=(TEXT, "gpt2"), words_pre=(TEXT, "gpt-2"), words_merges=(LIST, (TEXT, ["ab"]))),
        "has a merge 'ab'; expected two tokens",
    ),
    "a merge of what is no token": (
        changed(words_model=(TEXT, "gpt2"), words_pre=(TEXT, "gpt-2"), words_merges=(LIST, (TEXT, ["a z"]))),
        "the tokenizer in .* cannot be made",
    ),
    "an unknown vocabulary": (changed(words_model=(TEXT, "bert")), "has tokenizer.ggml.model 'bert'; expected one of"),
    "no tokens": (changed(words_tokens=None), "has tokenizer.ggml.tokens None; expected"),
    "a token twice": (changed(words_tokens=(LIST, (TEXT, [*"abcdefg", "a"]))), "tokens 'a'; expected each once"),
    "too few types": (
        changed(words_token_type=(LIST, (U32, [1]))),
        "has tokenizer.ggml.token_type .* expected 8 numbers",
    ),
    "special tokens alone": (
        changed(
            words_tokens=(LIST, (TEXT, list(map(str, range(70_000))))), words_token_type=(LIST, (U32, [3] * 70_000))
        ),
        "expected at most 65,536 special tokens",
    ),
    "no scores": (changed(words_scores=None), "has tokenizer.ggml.scores None; expected 8 finite numbers"),
    "scores that are not finite": (changed(words_scores=(LIST, (F32, [np.nan] * 8))), "expected 8 finite numbers"),
    "a flag that is a number": (changed(words_add_bos_token=(U32, 1)), "add_bos_token 1; expected true or false"),
    "an end that is a word": (changed(words_eos_token_id=(TEXT, "2")), "has eos_token_id '2'; expected a token id"),
    "an end of turn that is a word": (
        changed(words_eot_token_id=(TEXT, "2")),
        r"has eos_token_id \[2, '2'\]; expected",
    ),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_file(data: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return write_file


def test_the_file_that_is_changed_is_whole(write: Callable[[bytes], Path]) -> None:
    model = load(write(WHOLE))
    assert model.tokenizer("ab")["input_ids"][-1] == 7
    assert not any(np.isnan(model(np.array([[1, 3, 7]], np.int32))).ravel())


@pytest.mark.parametrize("case", CASES)
def test_one_line(write: Callable[[bytes], Path], case: str) -> None:
    data, message = CASES[case]
    with pytest.raises(InputError, match=message) as caught:
        load(write(data))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_cut_anywhere(write: Callable[[bytes], Path]) -> None:
    for size in (*range(0, 1500, 7), *range(1500, len(WHOLE), 997)):
        with pytest.raises(InputError):
            read_architecture(write(WHOLE[:size]))


def test_any_byte_may_be_wrong(write: Callable[[bytes], Path]) -> None:
    """Whatever the header says, it is read or refused in one line."""
    random, begin = np.random.default_rng(0), len(WHOLE) - 32 * sum(map(len, tensors().values()))
    read, refused = 0, []
    for at in random.choice(min(begin, 1700), 400, replace=False):
        data = bytearray(WHOLE)
        data[at] = random.integers(256)
        try:
            load(write(bytes(data)))
            read += 1
        except InputError as error:
            refused.append(str(error))
    assert read > 20
    assert len(refused) > 20
    assert not [message for message in refused if "\n" in message]


def test_a_header_without_end(tmp_path: Path) -> None:
    """Of a file of 4 GB that says it is all metadata, little is read."""
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<I2Q", 3, 0, 2**62))
        file.truncate(2**32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="has '' twice in its metadata"):
        read_header(path)
    with path.open("r+b") as file:
        file.write(b"GGUF" + struct.pack("<I2Q", 3, 0, 1) + text("a") + struct.pack("<IIQ", LIST, TEXT, 2**27))
    with pytest.raises(InputError, match="has more than 67,108,864 bytes of metadata"):
        read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kilobytes


def test_the_command_line(write: Callable[[bytes], Path], capsys: pytest.CaptureFixture[str]) -> None:
    for case in ("cut numbers", "another architecture", "an unknown rule"):
        assert main(["generate", str(write(CASES[case][0])), "--prompt", "a"]) == 2
        captured = capsys.readouterr()
        assert [line[:7] for line in captured.err.splitlines() if "model.gguf" in line] == ["error: "]
        assert "Traceback" not in captured.err
        assert captured.out == ""


def test_without_the_package(write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"no module gguf\): pip install 'chai_jax\[gguf\]'"):
        load(write(WHOLE))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        load(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(WHOLE)
    with pytest.raises(InputError, match="is a file, which has no revision 'main'"):
        load(tmp_path / "model.gguf", revision="main")
    with pytest.raises(InputError, match=r"has no config\.json; .* give the file in it, model.gguf"):
        load(tmp_path)
