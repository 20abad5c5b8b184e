#!/usr/bin/env bash
# Set up chai_jax on a TPU machine (Cloud TPU VM v3-8, v4, v5e, v6e; a Kaggle TPU notebook) and check that JAX sees the
# TPU: it must be there, and nothing here or after this falls back to the CPU.
#
#   bash tpu_setup.sh            make or update .venv, print the devices
#   bash tpu_setup.sh --smoke    then run the main job on the built-in toy with few examples
#   bash tpu_setup.sh --small    rehearse all that on a CPU, without libtpu and with two updates a stage
#
# It may be run again: what is in order is kept. On a pod, run it on all hosts at once. Environment variables:
#   PYTHON       the interpreter, 3.11 or newer; otherwise the first one found, else one that uv fetches
#   HUGEPAGES    the kernel's switch for transparent hugepages, if it is not where Linux has it
set -euo pipefail
cd "$(dirname "$0")"

venv=.venv
hugepages=${HUGEPAGES:-/sys/kernel/mm/transparent_hugepage/enabled}

fail() {
    echo "tpu_setup.sh: $*" >&2
    exit 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The Ubuntu 22.04 of v2 to v4 images has Python 3.10 only, and some images have a Python without ensurepip. On Kaggle
# the system's Python would do, but its libtpu is pinned for another jax: a venv leaves it alone, and needs no restart.
make_venv() {
    local python
    for python in ${PYTHON:-python3.12 python3.13 python3.11 python3}; do
        if new_enough "$python" && "$python" -m venv --clear "$venv"; then return; fi
    done
    [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON cannot make a venv; expected Python 3.11 or newer with its venv module"
    echo "no Python 3.11 or newer with its venv module: asking uv for one"
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv || true
    export PATH="$HOME/.local/bin:$PATH"
    uv venv --quiet --clear --seed --python 3.12 "$venv" ||
        fail "found no Python 3.11 or newer: install one (sudo apt-get install python3.11-venv) or set PYTHON"
}

# libtpu-nightly writes the same folder as libtpu: whichever is installed second wins, so both go. A libtpu of another
# version is replaced by pip, because jax[tpu] names the one it needs; which jax it is, pyproject.toml says.
remove_stale_libtpu() {
    if "$venv/bin/python" -m pip show --quiet libtpu-nightly 2>/dev/null; then
        "$venv/bin/python" -m pip uninstall --quiet --yes libtpu-nightly libtpu
    fi
}

# From v5e on, the TPU runtime wants transparent hugepages: without them transfers are slow, and JAX warns at each start.
enable_hugepages() {
    case "$1" in *"TPU v2"* | *"TPU v3"* | *"TPU v4"* | *"(cpu)") return ;; esac
    if [ ! -e "$hugepages" ] || grep -qs '\[always\]' "$hugepages"; then return; fi
    { echo always >"$hugepages"; } 2>/dev/null || echo always | sudo -n tee "$hugepages" >/dev/null 2>&1 ||
        echo "could not switch on transparent hugepages; as root: echo always > $hugepages"
}

# Where JAX may choose, it falls back to the CPU; where the TPU is named, it says why it cannot have it.
backend=tpu platforms=tpu,cpu package=".[tpu]" job=()
case "${1:-}" in
    "") ;;
    --smoke) job=(--limit 32) ;;
    --small) backend=cpu platforms=cpu package=. job=(--limit 32 --max-steps 2 --max-train-examples 256) ;;
    *) fail "unknown argument $1; expected nothing, --smoke or --small" ;;
esac

for name in TPU_LIBRARY_PATH JAX_PLATFORMS; do
    if [ -n "${!name:-}" ]; then
        echo "$name=${!name} is ignored here; unset it in your shell too, or JAX may not see the TPU"
        unset "$name"
    fi
done
export JAX_PLATFORMS=$platforms

if ! { [ -x "$venv/bin/python" ] && new_enough "$venv/bin/python"; }; then make_venv; fi
remove_stale_libtpu
"$venv/bin/python" -m pip install --quiet -e "$package"

found=$("$venv/bin/chai-jax" env --require-backend "$backend") ||
    fail "no TPU to run on; is this a TPU machine, and is the TPU free? (sudo lsof -w /dev/accel* /dev/vfio/*)"
devices=$(sed -n 's/.*"device": "\([^"]*\)".*/\1/p' <<<"$found")
echo "${devices:-the first host of this pod prints the devices}"
enable_hugepages "$devices"

if [ "${#job[@]}" -gt 0 ]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
    "$venv/bin/chai-jax" run --require-backend "$backend" "${job[@]}" --out "$out/run"
fi
echo "ready: $venv/bin/chai-jax run --require-backend $backend"
