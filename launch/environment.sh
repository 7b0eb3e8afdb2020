# Sourced by every script here: the one place for the virtual environment, the pinned installations and environment variables.
# shellcheck shell=bash
#
#   MFTCODER_COBA_VENV       the virtual environment            default: .venv in the repository
#   MFTCODER_COBA_CACHE      models and tokenised data          default: ~/.cache/mftcoder_coba
#   MFTCODER_COBA_GPU_PARTS  1 installs requirements-gpu.txt    default: 0
#   PYTHON                   the interpreter of a new venv      default: the first Python >= 3.11 on the PATH
#   MFTCODER_COBA_CHECK_SECONDS  of the all-reduce that launchers for several GPUs measure before a run   default: 10

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${MFTCODER_COBA_VENV:-$ROOT/.venv}"
export MFTCODER_COBA_CACHE="${MFTCODER_COBA_CACHE:-$HOME/.cache/mftcoder_coba}"

# The tokenizers' threads and the ranks' own processes would stand in each other's way.
export TOKENIZERS_PARALLELISM=false
# Packed rows of changing sizes fragment the GPU's memory without it.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# NCCL: say what goes wrong, and end a run whose peer is gone instead of waiting for ever. The network's own settings
# (NCCL_SOCKET_IFNAME, NCCL_IB_HCA) belong to the cluster: set them before calling a launcher, they are passed on.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# What the ranks on other machines must find in their environment: a launcher over ssh passes on these and nothing else. All NCCL_* besides.
PASSED_ON=(
    PATH MFTCODER_COBA_CACHE TOKENIZERS_PARALLELISM PYTORCH_CUDA_ALLOC_CONF TORCH_NCCL_ASYNC_ERROR_HANDLING
    HF_HOME HF_HUB_OFFLINE OMP_NUM_THREADS DS_ACCELERATOR GLOO_SOCKET_IFNAME
)

say() { printf '== %s\n' "$*" >&2; }

# A mistake of the person at the keyboard: what was found, what to do.
user_error() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    user_error "no Python 3.11 or newer was found (python3 is $(python3 --version 2>&1 || true)); install one, or name it: PYTHON=/path/to/python3.11"
}

# Makes the virtual environment, installs what is pinned, and puts it first on the PATH. A second call installs nothing.
ensure_environment() {
    local python wanted stamp="$VENV/.installed"
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)"
        say "virtual environment: $VENV ($("$python" --version))"
        "$python" -m venv --clear "$VENV" || user_error "python -m venv failed; on Debian and Ubuntu install the package python3-venv"
    fi
    wanted="$(cat "$ROOT/requirements.txt" "$ROOT/requirements-gpu.txt" | cksum) ${MFTCODER_COBA_GPU_PARTS:-0}"
    if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
        say "installing requirements.txt (once; this takes some minutes)"
        # torch first and by itself: other packages look at the installed one when they are built.
        pip_install "$(grep '^torch==' "$ROOT/requirements.txt")"
        pip_install -r "$ROOT/requirements.txt"
        if [[ "${MFTCODER_COBA_GPU_PARTS:-0}" == 1 ]]; then
            pip_install --no-build-isolation -r "$ROOT/requirements-gpu.txt"
        fi
        printf '%s\n' "$wanted" >"$stamp"
    fi
    use_environment
}

pip_install() {
    "$VENV/bin/python" -m pip install --quiet --no-input --disable-pip-version-check "$@"
}

# Puts the virtual environment first on the PATH, as `activate` does.
use_environment() {
    [[ -f "$VENV/.installed" ]] || user_error "there is no complete virtual environment in $VENV; make it: bash launch/setup.sh"
    export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
    unset PYTHONHOME
}

# GPUs that this shell may use: CUDA_VISIBLE_DEVICES counts.
gpu_count() {
    if command -v nvidia-smi >/dev/null; then
        python -c 'import torch; print(torch.cuda.device_count())'
    else
        echo 0
    fi
}

# What processes of one machine share: its cores. Without a GPU, DeepSpeed's CPU accelerator is named, so that it need not guess.
use_machine() {
    local processes="$1" gpus="$2" cores
    cores="$(getconf _NPROCESSORS_ONLN)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
    if [[ "$gpus" == 0 ]]; then
        export DS_ACCELERATOR=cpu
    fi
}

# A port that nobody listens on now: two runs on one machine do not meet.
free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# The launchers' own options are taken out of the command line: --dry-run, --no-check. The rest is left in ARGUMENTS.
# shellcheck disable=SC2034 # those who source this file read them
read_launch_options() {
    DRY_RUN=0 CHECK=1 ARGUMENTS=()
    local argument
    for argument in "$@"; do
        case "$argument" in
            --dry-run) DRY_RUN=1 ;;
            --no-check) CHECK=0 ;;
            *) ARGUMENTS+=("$argument") ;;
        esac
    done
}

# The variables of PASSED_ON that are set, and NCCL's, as NAME=VALUE lines.
passed_on() {
    local name
    for name in "${PASSED_ON[@]}" "${!NCCL_@}"; do
        if [[ -n "${!name:-}" ]]; then
            printf '%s=%s\n' "$name" "${!name}"
        fi
    done
}

# With --dry-run the virtual environment need not be there: nothing is started.
use_environment_to_launch() {
    if ((DRY_RUN)); then
        passed_on | sed '/^PATH=/d; s/^/# /' # too long to read, and the caller's own
    else
        use_environment
    fi
}

# Starts a command, or shows it with --dry-run, so that a shell reads it as it would have been started.
launch() {
    if ((DRY_RUN)); then
        printf '%q ' "$@" | sed 's/ $//'
        printf '\n'
    else
        "$@"
    fi
}
