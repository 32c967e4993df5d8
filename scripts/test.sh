#!/usr/bin/env bash
# Runs the tests and the examples in the docstrings, two at a time (WORKERS=1 for one); arguments go to pytest:
# scripts/test.sh -k cut -x
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec python -m pytest -n "${WORKERS:-2}" --dist worksteal --doctest-modules torchtrim tests "$@"
