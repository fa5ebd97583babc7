#!/usr/bin/env bash
#SBATCH --job-name=asarm-training
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --mem=32G
#SBATCH --time=48:00:00
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# Train a model: bash _run_training.sh --config configs/train/tiny_english.yaml (--resume auto goes on with a stopped run)
# Runs unchanged under bash and sbatch (submit from the repository); arguments go to `python -m asarm train` (--help lists them).
# One process per GPU: sbatch --nodes=2 --gres=gpu:4 _run_training.sh ... trains with eight. Five minutes before the time limit, or when
# preempted, the run writes a checkpoint and the job goes back into the queue, to go on from there.
set -euo pipefail

launch="$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
[ -f "$launch" ] || launch="${SLURM_SUBMIT_DIR:?run the launcher from the repository}/scripts/launch.sh"
# shellcheck disable=SC1090
source "$launch"
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || set -- "$@" --resume auto
asarm_launch train "$@"
