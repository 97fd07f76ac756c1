#!/usr/bin/env bash
# Checks and benchmarks of engine and learner on one GPU, with torch and transformers alone: benchmarks/gpu.sh [FOLDER]
# Results go to FOLDER (default benchmarks/results) as *_gpu.json; the default settings are those of an H200.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
python -m benchmarks.checks --device cuda --out "$out/checks_gpu.json"
python -m benchmarks.rollout --device cuda --model sdar-4b --blocks 4 16 32 --schedules static --steps 4 \
  --prompts 256 --prompt 128 --new-tokens 256 --lengths fixed --max-batch 128 --cache-gb 40 --repeats 1 \
  --only-engine --out "$out/rollout_gpu.json"
python -m benchmarks.learner --device cuda --model sdar-1.7b --blocks 4 16 32 --samples 4 --new-tokens 1024 \
  --micro-batch-tokens 8192 --out "$out/learner_gpu.json"
