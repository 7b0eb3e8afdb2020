#!/usr/bin/env bash
# `train` on the machines of a hostfile, over ssh. Start it on the first of them:
#
#   bash launch/hostfile.sh HOSTFILE --config configs/X.json [--set a.b=c ...]
#
# HOSTFILE has a line per machine, "HOST slots=8": one line for 8 A100s, two for 16. Needed on every machine: this repository
# and its virtual environment (launch/setup.sh) under the same path, the data, and ssh (and pdsh) without a password.
#
# Ctrl-C ends the run with a checkpoint. DeepSpeed's launchers do not wait for it: this script ends first, with 1 on several machines and by the
# signal on one, and the ranks are killed 30 seconds after the signal. For a step and a checkpoint that take longer, and for exit code 75, signal a
# rank instead, any one on any machine (the same holds for a run under `deepspeed` by hand and for launch/quickstart.sh):
#
#   kill -USR1 "$(pgrep -of 'python[0-9.]* -u -m mftcoder_coba')"
#
# SIGTERM to this script alone ends the script and not the run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

hostfile="${1:-}"
[[ -n "$hostfile" && "$hostfile" != --* ]] || user_error "usage: bash launch/hostfile.sh HOSTFILE --config configs/X.json [--set a.b=c ...]"
[[ -f "$hostfile" ]] || user_error "no hostfile $hostfile"
hostfile="$(realpath "$hostfile")"
shift
use_environment

# DeepSpeed passes NCCL_* and PATH on by itself, the other variables by this file.
DS_ENV_FILE="$(mktemp)"
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
for name in MFTCODER_COBA_CACHE TOKENIZERS_PARALLELISM PYTORCH_CUDA_ALLOC_CONF TORCH_NCCL_ASYNC_ERROR_HANDLING HF_HOME OMP_NUM_THREADS; do
    if [[ -n "${!name:-}" ]]; then
        printf '%s=%s\n' "$name" "${!name}" >>"$DS_ENV_FILE"
    fi
done

deepspeed --hostfile "$hostfile" --no_local_rank --master_port "${MASTER_PORT:-29500}" --module mftcoder_coba train "$@"
