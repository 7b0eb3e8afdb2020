#!/usr/bin/env bash
# Checks what is written for GPUs on this machine's own, in minutes, and says what passed:
#
#   MFTCODER_COBA_GPU_PARTS=1 bash launch/setup.sh     once
#   bash launch/gpu_check.sh
#
# flash-attn, Liger, bitsandbytes, bfloat16 and several GPUs are held against the paths that the tests run on CPUs. What is not installed, or needs
# a second GPU, is skipped. Ends with 0 when nothing failed, 1 when something did, 2 where there is no GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment
cd "$ROOT"
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" exec python tests/gpu/gpu_check.py
