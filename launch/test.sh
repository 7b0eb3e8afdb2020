#!/usr/bin/env bash
# Set-up and the tests. Arguments go to pytest: bash launch/test.sh tests/balancing -k coba
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment
cd "$ROOT"
# Tests start up to four processes at once.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest "$@"
