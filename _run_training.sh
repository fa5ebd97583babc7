#!/usr/bin/env bash
#SBATCH --job-name=asarm-training
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --mem=32G
#SBATCH --time=48:00:00
#SBATCH --output=logs/%x-%j.out
# Train a model: bash _run_training.sh --config configs/train/tiny_english.yaml (--resume goes on with a stopped run)
# Runs unchanged under bash and sbatch (submit from the repository); arguments go to `python -m asarm train` (--help lists them).
set -euo pipefail

launch="$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
[ -f "$launch" ] || launch="${SLURM_SUBMIT_DIR:?run the launcher from the repository}/scripts/launch.sh"
# shellcheck disable=SC1090
source "$launch"
asarm_launch train "$@"
