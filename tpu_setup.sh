#!/usr/bin/env bash
# Set up chai_jax on a TPU VM (Cloud v3-8, v5e-8, newer; a Kaggle TPU session) and check that JAX sees the TPU.
#
#   bash tpu_setup.sh            make or update .venv, print the devices
#   bash tpu_setup.sh --smoke    then run the main job on the built-in toy with few examples
#
# It may be run again: what is in order is kept. Environment variables:
#   PYTHON                   the interpreter, 3.11 or newer; otherwise the first one found, else one that uv fetches
#   CHAI_JAX_DEVICE_CHECK    a command to run in place of the device check, to try this script without a TPU
set -euo pipefail
cd "$(dirname "$0")"

venv=.venv

fail() {
    echo "tpu_setup.sh: $*" >&2
    exit 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The Ubuntu 22.04 of v2 to v4 images has Python 3.10 only, and some images have a Python without ensurepip.
make_venv() {
    local python
    for python in ${PYTHON:-python3.12 python3.13 python3.11 python3}; do
        if new_enough "$python" && "$python" -m venv "$venv"; then return; fi
    done
    [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON cannot make a venv; expected Python 3.11 or newer with its venv module"
    echo "no Python 3.11 or newer with its venv module: asking uv for one"
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv || true
    export PATH="$HOME/.local/bin:$PATH"
    uv venv --quiet --clear --seed --python 3.12 "$venv" ||
        fail "found no Python 3.11 or newer: install one (sudo apt-get install python3.11-venv) or set PYTHON"
}

# libtpu-nightly writes the same folder as libtpu: whichever is installed second wins, so both go. A libtpu of another
# version is replaced by pip, because jax[tpu] names the one it needs.
remove_stale_libtpu() {
    if "$venv/bin/pip" show --quiet libtpu-nightly 2>/dev/null; then
        "$venv/bin/pip" uninstall --quiet --yes libtpu-nightly libtpu
    fi
}

# JAX falls back to the CPU without a word when it may choose; naming the TPU first makes it an error.
check_devices() {
    if [ -n "${CHAI_JAX_DEVICE_CHECK:-}" ]; then
        bash -c "$CHAI_JAX_DEVICE_CHECK"
        return
    fi
    JAX_PLATFORMS=tpu,cpu "$venv/bin/python" - <<'PYTHON'
import sys

import jax

try:
    devices = jax.devices("tpu")
except RuntimeError as error:
    sys.exit(f"JAX {jax.__version__} sees no TPU: {error}")
print(f"{len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}")
PYTHON
}

case "${1:-}" in
    "" | --smoke) ;;
    *) fail "unknown argument $1; expected nothing or --smoke" ;;
esac

for name in TPU_LIBRARY_PATH JAX_PLATFORMS; do
    if [ -n "${!name:-}" ]; then
        echo "$name=${!name} is ignored here; unset it in your shell too, or JAX may not see the TPU"
        unset "$name"
    fi
done

if ! { [ -x "$venv/bin/pip" ] && new_enough "$venv/bin/python"; }; then make_venv; fi
remove_stale_libtpu
"$venv/bin/python" -m pip install --quiet -e ".[tpu]"

check_devices || fail "no TPU to run on; is this a TPU VM, and is the TPU free? (sudo lsof -w /dev/accel* /dev/vfio/*)"

if [ "${1:-}" = --smoke ]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
    "$venv/bin/chai-jax" run --limit 32 --out "$out/run"
fi
echo "ready: $venv/bin/chai-jax run"
