#!/usr/bin/env bash
# Install dovetail with its test dependencies into the current environment; lint, type-check and test it.
set -euo pipefail
cd "$(dirname "$0")"
pip install --quiet --editable '.[test]'
ruff check .
ruff format --check .
lint-imports
mypy
# Two processes, since many tests wait for a compiler or for other processes; a file stays in one, with what it starts.
# Threads that wait give way to the other process: see src/dovetail/threads.py.
GOMP_SPINCOUNT=5000 pytest --numprocesses 2 --dist loadfile
