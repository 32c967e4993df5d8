#!/usr/bin/env bash
# Runs the demo; arguments go to `torchtrim demo` (try --help). Results land in demo-output/.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec torchtrim demo "$@"
