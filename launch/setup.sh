#!/usr/bin/env bash
# The virtual environment alone, e.g. once on a cluster's shared file system before jobs are started.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment
say "ready: $VENV"
