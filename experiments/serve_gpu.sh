#!/usr/bin/env bash
# Equal memory for the cache, dense and in few bits, under the same open load on a GPU: slots, requests/s, tokens/s, p95.
#
#   bash experiments/serve_gpu.sh TOKENIZER_FOLDER [OUT]
#   bash experiments/serve_gpu.sh --small [OUT]       # a rehearsal: the toy's shape on the CPU, a few minutes
#
# Random weights of opt-1.3b, whose speed is that of real ones, with the tokenizer of TOKENIZER_FOLDER (OPT's). Each
# server has 8 GiB for its cache, of requests of 2,048 tokens. An estimate for one H200: 6 minutes, most of it compiling.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
if [ "$1" = --small ]; then
    export JAX_PLATFORMS=cpu
    out=${2:-runs/small/serve} memory=1MiB context=64 rate=20 requests=20 prompt=4:16 new=8
    tokenizer=$out/toy shape=$out/toy
    if [ ! -d "$tokenizer" ]; then "$python" -m chai_jax export toy --out "$tokenizer"; fi
else
    out=${2:-runs/serve_gpu} memory=8GiB context=2048 rate=50 requests=600 prompt=64:512 new=128
    tokenizer=$1 shape=facebook/opt-1.3b
fi
mkdir -p "$out"

model=$out/random
if [ ! -d "$model" ]; then
    "$python" - "$shape" "$tokenizer" "$model" <<'PYTHON'
import sys

from transformers import AutoTokenizer

from chai_jax.files.export import export
from chai_jax.sources import open_model

shape, tokenizer, folder = sys.argv[1:]
export(open_model(f"random:{shape}").replace(tokenizer=AutoTokenizer.from_pretrained(tokenizer)), folder)
PYTHON
fi

export CHAI_JAX_GPU_BLOCKS=1 # kernels that read blocks of few bits as they are stored
serve="$python -m chai_jax serve {model} --port {port} --name opt --kv-memory $memory --context $context --prefixes 0"
serve="$serve --compile-cache $out/programs"
"$python" experiments/serve_peers.py "$model" --seeds 0 --out "$out" --rates "$rate" --requests "$requests" --rounds 1 \
    --prompt-tokens "$prompt" --new-tokens "$new" \
    --servers "k4v4@opt=$serve --storage k4v4" "dense@opt=$serve"
