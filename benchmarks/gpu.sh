#!/usr/bin/env bash
# Checks and benchmarks of engine and learner on one GPU, with torch and transformers alone:
#   benchmarks/gpu.sh [FOLDER [checks|rollout|learner]...]
# Results go to FOLDER (default benchmarks/results) as *_gpu.json; the default settings are those of an H200. Without
# names all three are run; the learner's takes longest.
# What fails is named at the end, with exit code 1; the others run all the same.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=${1:-benchmarks/results}
mkdir -p "$out" || exit
shift || true
wanted=" ${*:-checks rollout learner} "
failed=()
measure() { # MODULE RESULT [arguments]
  local module=$1 result=$2
  shift 2
  [[ $wanted == *" $module "* ]] || return 0
  "${PYTHON:-python}" -m "benchmarks.$module" --device cuda --out "$out/${result}_gpu.json" "$@" || failed+=("$result")
}
decode=(--model sdar-4b --blocks 4 16 32 --schedules static --steps 4 --prompts 256 --prompt 128 --new-tokens 256
  --lengths fixed --max-batch 128 --cache-gb 40 --repeats 2 --only-engine)
measure checks checks
measure rollout rollout "${decode[@]}" --cuda-graphs
measure rollout rollout_kernels "${decode[@]}" --cuda-graphs --triton-kernels
measure learner learner --model sdar-1.7b --blocks 4 16 32 --samples 4 --new-tokens 1024 --micro-batch-tokens 8192 --repeats 1
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
