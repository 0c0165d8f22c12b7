#!/usr/bin/env bash
# The checks of Flower's baselines (structure, formatting, lint, types), then the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The README's environment, where it stands with these tools; else the active one.
if [ -x .venv/bin/pylint ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi

for file in client_app dataset model server_app strategy utils; do
    test -f "gwpf_baseline/$file.py" || { echo "gwpf_baseline/$file.py is missing"; exit 1; }
done
python -m isort --check-only .
python -m black --check .
python -m docformatter --check --recursive gwpf_baseline tests benchmarks
python -m ruff check .
python -m mypy .
python -m pylint gwpf_baseline
# NumPy's products, however small, wait for a second thread: where both cores are at
# work, features of recordings take ten times as long.
export OPENBLAS_NUM_THREADS=1
# Two files of tests at a time, on two cores.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10 "$@"
