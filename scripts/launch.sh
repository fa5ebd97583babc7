# shellcheck shell=bash
# Shared by the launchers: set up, then run `python -m asarm` with the launcher's command and the user's arguments, in the folder where the
# user is (under sbatch: where the job was submitted), as one process per GPU on every node of the job.
#
# A process on its own is started directly, several by `accelerate launch`. ASARM_PROCESSES=N asks for N on each node, GPUs or not.
# USR1 (Slurm's warning before it takes the nodes away), TERM and Ctrl-C reach Python: training answers with a checkpoint and status 75.
# Such a job is requeued; one that failed, or that was cancelled, is not.

asarm_launch() {
    local root status=0
    trap 'asarm_requeue; exit 138' USR1 # until there is a process to pass it on to
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    # shellcheck disable=SC1091
    source "$root/scripts/setup.sh"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    [ -t 2 ] || export TQDM_MININTERVAL="${TQDM_MININTERVAL:-60}" # a line a minute is enough in a log file
    asarm_command "$root" "$@"
    asarm_run || status=$?
    # 75: stopped at a checkpoint; 138: by USR1 before training was ready to answer it, so that nothing is lost either
    case $status in 75 | 138) asarm_requeue ;; esac
    return "$status"
}

# Set ASARM_COMMAND to the program with its arguments ("$@" without the first, the repository).
asarm_command() {
    local root=$1 nodes=${SLURM_NNODES:-1} processes address=127.0.0.1 port=0 # 0: any free port
    shift
    processes=${ASARM_PROCESSES:-$(asarm_gpus)}
    ASARM_COMMAND=(python -m asarm "$@")
    [ $((nodes * processes)) -gt 1 ] || return 0
    if [ "$nodes" -gt 1 ]; then # the batch script runs on the first of the nodes
        read -r address < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        port=$((20000 + SLURM_JOB_ID % 10000))
    fi
    ASARM_COMMAND=(python "$root/scripts/accelerate_launch.py" --multi_gpu --mixed_precision no --dynamo_backend no
        --num_machines "$nodes" --num_processes $((nodes * processes))
        --main_process_ip "$address" --main_process_port "$port" --gpu_ids all
        --num_cpu_threads_per_process "$(asarm_threads "$processes")" -m asarm "$@")
    # once one node's processes have ended, the others have a minute to end too
    [ "$nodes" -eq 1 ] || ASARM_COMMAND=(srun --nodes="$nodes" --ntasks="$nodes" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=60
        "${ASARM_COMMAND[@]}")
}

# How many processes to start on a node: one per GPU that PyTorch sees, or one.
asarm_gpus() {
    local gpus=0
    if command -v nvidia-smi > /dev/null; then
        gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    fi
    echo $((gpus > 1 ? gpus : 1))
}

# The CPU threads of each of so many processes on a node: left alone, accelerate gives them one.
asarm_threads() {
    local threads=$((${SLURM_CPUS_PER_TASK:-$(nproc)} / $1))
    echo $((threads > 1 ? threads : 1))
}

# Run ASARM_COMMAND, passing signals on to it; the status is its own.
asarm_run() {
    local child status signalled=1
    "${ASARM_COMMAND[@]}" &
    child=$!
    trap 'signalled=1; kill -USR1 "$child" 2> /dev/null || :' USR1
    trap 'signalled=1; kill -TERM "$child" 2> /dev/null || :' TERM INT # a background process ignores INT
    while [ "$signalled" = 1 ]; do # a signal ends `wait` before the process has ended
        signalled=0 status=0
        wait "$child" || status=$?
    done
    trap - USR1 TERM INT
    return "$status"
}

# Put the job back into the queue, unless it is stopping because it was cancelled. (Under bash, Python has said how to go on.)
asarm_requeue() {
    [ -n "${SLURM_JOB_ID:-}" ] || return 0
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
        echo "launch: requeueing job $SLURM_JOB_ID" >&2
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "launch: job $SLURM_JOB_ID is being ended and not requeued" >&2
    fi
}
