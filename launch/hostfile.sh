#!/usr/bin/env bash
# `train` on the machines of a hostfile, over ssh. Start it on the first of them:
#
#   bash launch/hostfile.sh [--dry-run] [--no-check] HOSTFILE --config configs/X.json [--set a.b=c ...]
#
#   --dry-run    show the commands and the variables that are passed on; start nothing
#   --no-check   do without `check-nodes`, which looks at every machine first (half a minute)
#
# HOSTFILE has a line per machine, "HOST slots=8" (examples: launch/hostfiles): one line for 8 A100s, two for 16. With several, needed on every
# machine: this repository and its virtual environment (launch/setup.sh) under the same path, the data, the run folder on a file system that all
# share, pdsh, and ssh without a password. MASTER_ADDR names the first machine's address where `hostname -I` gives one of another network first.
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

read_launch_options "$@"
hostfile="${ARGUMENTS[0]:-}"
[[ -n "$hostfile" && "$hostfile" != -* ]] ||
    user_error "usage: bash launch/hostfile.sh [--dry-run] [--no-check] HOSTFILE --config configs/X.json [--set a.b=c ...]"
[[ -f "$hostfile" ]] || user_error "no hostfile $hostfile"
hostfile="$(realpath "$hostfile")"
wrong="$(grep -nvE '^[[:space:]]*(#.*)?$|^[[:space:]]*[^[:space:]]+[[:space:]]+slots=[0-9]+' "$hostfile" || true)"
[[ -z "$wrong" ]] || user_error "$hostfile: a line is to be \"HOST slots=NUMBER\"; found ${wrong%%$'\n'*}"
hosts="$(grep -cE '^[[:space:]]*[^#[:space:]]' "$hostfile" || true)"
((hosts > 0)) || user_error "$hostfile names no machine; a line is \"HOST slots=NUMBER\""
use_environment_to_launch

options=(--hostfile "$hostfile" --no_local_rank --master_port "${MASTER_PORT:-29500}")
if ((hosts == 1)); then
    # DeepSpeed starts one machine's ranks without ssh, but asks over ssh for its address unless it is given.
    options+=(--no_ssh_check --master_addr "${MASTER_ADDR:-127.0.0.1}")
else
    ((DRY_RUN)) || command -v pdsh >/dev/null || user_error "pdsh is not installed, by which DeepSpeed starts several machines (apt-get install pdsh)"
    # A machine that is gone does not close its connection: without a sign of life for a minute, ssh gives it up, and the launcher ends.
    export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:--o ServerAliveInterval=15 -o ServerAliveCountMax=4}"
    if [[ -n "${MASTER_ADDR:-}" ]]; then
        options+=(--master_addr "$MASTER_ADDR")
    fi
    if ((DRY_RUN == 0)); then
        DS_ENV_FILE="$(mktemp)" # what DeepSpeed passes on to the other machines
        export DS_ENV_FILE
        trap 'rm -f "$DS_ENV_FILE"' EXIT
        passed_on >"$DS_ENV_FILE"
    fi
fi

if ((CHECK)); then
    launch deepspeed --quiet "${options[@]}" --module mftcoder_coba check-nodes --seconds "${MFTCODER_COBA_CHECK_SECONDS:-10}" "${ARGUMENTS[@]:1}"
fi
launch deepspeed "${options[@]}" --module mftcoder_coba train "${ARGUMENTS[@]:1}"
