#!/usr/bin/env bash
# Equal memory for the cache, dense and in few bits, under the same open load on a GPU: slots, requests/s, tokens/s, p95.
#
#   bash experiments/serve_gpu.sh TOKENIZER_FOLDER [OUT]
#
# Random weights of opt-1.3b, whose speed is that of real ones, with the tokenizer of TOKENIZER_FOLDER (OPT's). Each
# server has 8 GiB for its cache, of requests of 2,048 tokens. An estimate for one H200: 6 minutes, most of it compiling.
set -euo pipefail
cd "$(dirname "$0")/.."
tokenizer=$1
out=${2:-runs/serve_gpu}
python=${PYTHON:-python}
mkdir -p "$out"

model=$out/opt-1.3b
if [ ! -d "$model" ]; then
    "$python" - "$tokenizer" "$model" <<'PYTHON'
import sys

from transformers import AutoTokenizer

from chai_jax.files.export import export
from chai_jax.sources import open_model

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
export(open_model("random:facebook/opt-1.3b").replace(tokenizer=tokenizer), sys.argv[2])
PYTHON
fi

export CHAI_JAX_GPU_BLOCKS=1 # kernels that read blocks of few bits as they are stored
serve="$python -m chai_jax serve {model} --port {port} --name opt --kv-memory 8GiB --context 2048 --prefixes 0"
serve="$serve --compile-cache $out/programs"
"$python" experiments/serve_peers.py "$model" --seeds 0 --out "$out" --rates 50 --requests 600 --rounds 1 \
    --prompt-tokens 64:512 --new-tokens 128 \
    --servers "k4v4@opt=$serve --storage k4v4" "dense@opt=$serve"
