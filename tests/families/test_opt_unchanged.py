"""OPT is what it was before other families came: the same bits, by hashes that were taken then.

Bits are those of one machine and one jaxlib: XLA's dots differ between kinds of CPUs. Elsewhere this is skipped.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from chai_jax.analyse.planner import plan
from chai_jax.analyse.probe import probe
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize
from chai_jax.files.store import load
from chai_jax.model.model import Model
from chai_jax.serve.generate import generate_tokens

HASHES = Path(__file__).parent / "opt_hashes.json"


def here() -> str:
    """What bits depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")
    return f"jaxlib {version('jaxlib')}, {len(jax.devices())} devices, {name}"


def digest(value: Any) -> str:
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(value):
        found.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return found.hexdigest()[:16]


def hashes(model: Model) -> dict[str, str]:
    """Of what each part of the package makes of a dense model."""
    tokens = np.random.default_rng(0).integers(4, 500, (8, 40)).astype(np.int32)
    mask = np.arange(40) >= np.array([0, 3, 11, 0, 0, 7, 0, 1])[:, None]
    seen = probe(model, tokens.tolist())
    found = {"logits": digest(model(tokens, mask)), "probe": digest([seen.attention, seen.outputs, seen.scores])}
    found["fingerprint"] = seen.fingerprint[:16]
    low_rank = {"score_merge": "low_rank", "value_merge": "fit"}
    for share, rest in (("qk", {}), ("qkv", {}), ("qkv", low_rank), ("kv", {})):
        name = f"{share} {' '.join(rest.values())}".strip()
        made = plan(model, seen, share=share, clusters=0.5, layers=0.5, **rest)  # type: ignore[arg-type]
        found[f"plan {name}"] = digest(np.frombuffer(json.dumps(made.to_json()).encode(), np.uint8))
        small = quantize(cluster(model, made, seen), made)
        found[f"weights {name}"], found[f"logits {name}"] = digest(small.params), digest(small(tokens, mask))
        text = generate_tokens(small, tokens[:2, :9].tolist(), max_new_tokens=5, stop=False)
        found[f"text {name}"] = digest(np.array(text))
    return found


@pytest.mark.slow
def test_the_same_bits(shared: Path) -> None:
    stored = json.loads(HASHES.read_text())
    if stored["of"] != here():
        pytest.skip(f"the hashes are of {stored['of']}, this is {here()}")
    assert hashes(load(shared / "models/opt-mini")) == stored["opt-mini"]
