#!/usr/bin/env bash
# Runs the tests and the examples in the docstrings; arguments go to pytest: scripts/test.sh -k cut -x
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec python -m pytest --doctest-modules torchtrim tests "$@"
