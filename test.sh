#!/usr/bin/env bash
# Install dovetail with its test dependencies into the current environment; lint, type-check and test it.
set -euo pipefail
cd "$(dirname "$0")"
pip install --quiet --editable '.[test]'
ruff check .
ruff format --check .
lint-imports
mypy
pytest
