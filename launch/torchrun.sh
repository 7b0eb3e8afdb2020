#!/usr/bin/env bash
# `train` by torchrun, on one machine or on several. The same command on every machine, but for --node-rank:
#
#   bash launch/torchrun.sh --config configs/X.json [--set a.b=c ...]                                             8 A100s here
#   bash launch/torchrun.sh --nnodes 2 --node-rank 0 --master-addr HOST0 --config configs/X.json [--set ...]      16 in two machines: on HOST0
#   bash launch/torchrun.sh --nnodes 2 --node-rank 1 --master-addr HOST0 --config configs/X.json [--set ...]      ... and on the other
#
#   --nproc-per-node N   ranks on each machine      default: its GPUs
#   --master-port P      and the one after it       default: 29500
#   --dry-run            show the commands; start nothing
#   --no-check           do without `check-nodes`, which looks at every machine first (half a minute)
#
# The exit code is that of the rank that ended first. A signal to this script's torchrun (SIGTERM, SIGUSR1, Ctrl-C) goes on to its ranks: the run
# ends with a checkpoint, for which they have ten minutes; the script then ends with 128 + the signal, on the other machines with 75.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

read_launch_options "$@"
set -- "${ARGUMENTS[@]}"
nodes=1 node_rank=0 master_addr="" master_port="${MASTER_PORT:-29500}" processes="" rest=()
while (($#)); do
    case "$1" in
        --nnodes | --node-rank | --master-addr | --master-port | --nproc-per-node)
            [[ -n "${2:-}" ]] || user_error "$1 needs a value"
            case "$1" in
                --nnodes) nodes="$2" ;;
                --node-rank) node_rank="$2" ;;
                --master-addr) master_addr="$2" ;;
                --master-port) master_port="$2" ;;
                --nproc-per-node) processes="$2" ;;
            esac
            shift 2
            ;;
        *) rest+=("$1") && shift ;;
    esac
done
for number in "$nodes" "$node_rank" "$master_port" "${processes:-1}"; do
    [[ "$number" =~ ^[0-9]+$ ]] || user_error "$number is no whole number"
done
((node_rank < nodes)) || user_error "--node-rank $node_rank: with --nnodes $nodes it is 0 to $((nodes - 1))"
((nodes == 1)) || [[ -n "$master_addr" ]] || user_error "--nnodes $nodes: --master-addr names the machine of --node-rank 0, the same everywhere"
use_environment_to_launch

gpus=0
((DRY_RUN)) || gpus="$(gpu_count)"
if [[ -z "$processes" ]]; then
    ((DRY_RUN == 0)) || gpus=8
    ((gpus > 0)) || user_error "there is no GPU here; --nproc-per-node N starts N ranks on CPUs"
    processes="$gpus"
fi
((DRY_RUN)) || use_machine "$processes" "$gpus"

# start PORT COMMAND ...: the two runs have a port each, for one machine may still be leaving the first when another begins the second.
start() {
    local port="$1"
    shift
    launch python "$ROOT/launch/torchrun.py" --nnodes "$nodes" --node-rank "$node_rank" --nproc-per-node "$processes" \
        --master-addr "${master_addr:-127.0.0.1}" --master-port "$port" \
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 600 -m mftcoder_coba "$@"
}

if ((CHECK)); then
    start "$((master_port + 1))" check-nodes --seconds "${MFTCODER_COBA_CHECK_SECONDS:-10}" "${rest[@]}"
fi
start "$master_port" train "${rest[@]}"
