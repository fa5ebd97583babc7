#!/usr/bin/env bash
# Set up and run the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck disable=SC1091
source scripts/setup.sh
ruff check .
ruff format --check .
mypy
exec python -m pytest -n "${ASARM_TEST_WORKERS:-2}" --dist worksteal "$@"
