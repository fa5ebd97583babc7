#!/usr/bin/env bash
#SBATCH --job-name=asarm-code-infill
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --mem=32G
#SBATCH --time=01:00:00
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Infill lines and spans of HumanEval's programs: bash _run_code_infill_eval.sh --benchmark single-line --allow_code_execution
# Without --allow_code_execution nothing that a model wrote is run: samples for the benchmark's own evaluator, no pass@k.
# Runs unchanged under bash and sbatch (submit from the repository); arguments go to `python -m asarm eval code-infill` (--help lists them).
# Several GPUs share the sequences, and so do the jobs of an array: sbatch --array=0-3 _run_code_infill_eval.sh --output_dir DIR
set -euo pipefail

launch="$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
[ -f "$launch" ] || launch="${SLURM_SUBMIT_DIR:?run the launcher from the repository}/scripts/launch.sh"
# shellcheck disable=SC1090
source "$launch"
asarm_launch eval code-infill "$@"
