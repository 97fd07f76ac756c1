#!/usr/bin/env bash
# A Ray cluster inside a SLURM allocation, and a run on it:  sbatch cluster/examples/slurm.sh [settings]
# Submit it from the checkout, whose environment every node sees (.venv, or the one that TSTAR_VENV names). Submit the same
# command again after a time limit or a pre-emption: the run continues from its newest checkpoint.
#SBATCH --job-name=tstar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
source "${TSTAR_VENV:-$PWD/.venv}/bin/activate"
runs=${TSTAR_RUNS:-$HOME/tstar-runs}   # on storage that every node sees
export HF_HOME=${HF_HOME:-$runs/huggingface}
# srun takes the cores of a task from here, not from sbatch (SLURM 22.05 and newer).
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000))
# One token for this allocation, so that neither ~/.ray nor other users' clusters matter.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  ray start --head --block --node-ip-address="$address" --port="$port" --disable-usage-stats &
sleep 30
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
  srun --nodes="$others" --ntasks="$others" --exclude="$head" --overlap \
    ray start --block --address="$address:$port" --disable-usage-stats &
  sleep 20
fi

# Two nodes of eight GPUs, all in use. SLURM's warning, five minutes before the end, is passed on: the run saves and ends.
RAY_ADDRESS="$address:$port" python -m tstar_ray.run --config configs/sdar_8b_2nodes.yaml \
  run.dir="$runs" run.name=sdar-8b run.resume=auto "$@" &
driver=$!
trap 'kill -TERM $driver' TERM
wait $driver || wait $driver
