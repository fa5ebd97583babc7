#!/usr/bin/env bash
# The launchers under a real Slurm: starts one with two nodes on this machine, trains, preempts, requeues, resumes, cancels, evaluates in an
# array, and compares every result with that of an uninterrupted run. Exit status 0 if all of it holds; a few minutes on two cores.
#
#   bash scripts/slurm_smoke.sh [--install]
#
# Needs root and Slurm's daemons (Debian: slurm-wlm munge), which --install gets with apt-get. Nothing outside a temporary folder is
# written, no running Slurm is touched, and the daemons are stopped at the end. No systemd, cgroups, GPU, network or data folder is needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = --install ]; then
    apt-get update -qq
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge > /dev/null # 1: start no service
fi
for program in slurmctld slurmd munged sbatch; do
    command -v "$program" > /dev/null || { echo "slurm_smoke: no $program; install slurm-wlm and munge, or call with --install" >&2; exit 2; }
done
# shellcheck disable=SC1091
source scripts/setup.sh

work=$(mktemp -d "${TMPDIR:-/tmp}/asarm-slurm-XXXXXX")
log=$work/%x-%j.log
export SLURM_CONF=$work/slurm.conf CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 TQDM_DISABLE=1 HF_HUB_OFFLINE=1 ASARM_NO_INSTALL=1
unset ASARM_DATA_DIR
started=$SECONDS

say() { printf '%4d s  %s\n' $((SECONDS - started)) "$*"; }

clean_up() {
    local status=$? file
    trap - EXIT
    if [ "$status" -ne 0 ]; then
        say "FAILED; the last lines of every log:"
        tail -n 30 "$work"/*.log
    fi
    scancel --user="$(id -un)" 2> /dev/null || :
    wait_for 60 "no job" no_jobs || :
    for file in "$work"/*.pid; do kill "$(cat "$file")" 2> /dev/null || :; done
    export -n SLURM_CONF # by which the daemons and what they started are known
    wait_for 20 "no daemon" no_processes || processes | xargs --no-run-if-empty kill -KILL || :
    rm -rf "$work"
    say "daemons stopped, $work removed"
    exit "$status"
}

processes() { grep -lzs "^SLURM_CONF=$SLURM_CONF$" /proc/[0-9]*/environ | cut -d/ -f3; }
no_processes() { [ -z "$(processes)" ]; }

# wait_for SECONDS WHAT COMMAND...: until the command succeeds
wait_for() {
    local limit=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" > /dev/null 2>&1; do
        [ "$SECONDS" -lt "$limit" ] || { say "waited in vain for: $what"; return 1; }
        sleep 0.3
    done
}

# check WHAT COMMAND...: the command must succeed
check() {
    local what=$1
    shift
    "$@" || { say "NOT SO: $what"; return 1; }
    say "ok: $what"
}

start_slurm() {
    local host node
    host=$(hostname -s) # the first node's name: the processes on both meet there
    cat > "$SLURM_CONF" << CONF
ClusterName=asarm-smoke
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17817
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool.%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=20
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=$host NodeHostname=$host NodeAddr=127.0.0.1 Port=17818 CPUs=2 RealMemory=8000
NodeName=$host-2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17819 CPUs=2 RealMemory=8000
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
CONF
    mkdir "$work/state"
    head -c 128 /dev/urandom > "$work/munge.key"
    chmod 400 "$work/munge.key"
    munged --force --key-file="$work/munge.key" --socket="$work/munge.socket" --pid-file="$work/munged.pid" \
        --log-file="$work/munged.log" --seed-file="$work/munge.seed" 2> "$work/munged.err.log"
    slurmctld
    for node in "$host" "$host-2"; do slurmd -N "$node"; done
    wait_for 30 "two idle nodes" nodes_are_idle
    say "$(slurmctld -V): $(sinfo --noheader --format='%D nodes %T')"
}

nodes_are_idle() { [ "$(sinfo --noheader --format='%D %T')" = "2 idle" ]; }
no_jobs() { [ -z "$(squeue --noheader)" ]; }
job_field() { scontrol --oneliner show job "$1" | grep -oP "(?<= $2=)[^ ]+"; }
is_field() { [ "$(job_field "$1" "$2")" = "$3" ]; }
not_in_queue() { [ -z "$(squeue --noheader --jobs="$1")" ]; }
reached() { [ "$(wc -l < "$work/$1/metrics.jsonl")" -ge "$2" ]; }
newest() { basename "$(find "$work/$1/checkpoints" -name 'step-*' | sort | tail -n 1)"; }
same_weights() { cmp "$work/$1/final/model.safetensors" "$work/$2/final/model.safetensors"; }

every_step_once() {
    python -c 'import json, sys; sys.exit([json.loads(line)["step"] for line in sys.stdin] != [*range(1, 301)])' < "$work/$1/metrics.jsonl"
}

same_records() { # but for the seconds
    python - "$work/$1" "$work/$2" << 'PYTHON'
import json, sys
one, two = ([json.loads(line) | {"seconds": None} for line in open(f"{run}/records.jsonl")] for run in sys.argv[1:])
sys.exit(not one == two or not json.load(open(f"{sys.argv[2]}/summary.json"))["complete"])
PYTHON
}

# submit NAME OPTION... LAUNCHER ARGUMENT...: as its header says, but for what this machine does not have; prints the job's number
submit() {
    local name=$1
    shift
    sbatch --parsable --job-name="$name" --output="$log" --gres=none --cpus-per-task=1 --mem=1G --time=10 "$@"
}

# train NAME OPTION...
train() {
    local name=$1
    shift
    submit "$name" "$@" _run_training.sh --config configs/train/smoke.yaml --output_dir "$work/$name"
}

# straight NAME: the run that is never interrupted, under bash
straight() {
    bash _run_training.sh --config configs/train/smoke.yaml --output_dir "$work/$1" > "$work/$1.log" 2>&1
    check "$1, under bash, uninterrupted: every step once" every_step_once "$1"
}

# preempt NAME OPTION...: a training job that makes room for a more urgent one, is requeued, goes on from its checkpoint and ends
preempt() {
    local name=$1 job urgent
    job=$(train "$@")
    wait_for 120 "step 10 of job $job" reached "$name" 10
    urgent=$(sbatch --parsable --partition=urgent --nodes=2 --exclusive --job-name=urgent --output="$log" --wrap "sleep 3")
    say "job $job ($name) trains on $(job_field "$job" NumNodes) node(s); job $urgent, more urgent, needs them: Slurm preempts job $job"
    wait_for 120 "requeue of job $job" is_field "$job" Restarts 1
    wait_for 120 "job $job pending" is_field "$job" JobState PENDING
    say "job $job is back in the queue; newest checkpoint: $(newest "$name")"
    wait_for 120 "end of job $urgent" not_in_queue "$urgent"
    scontrol update JobId="$job" StartTime=now # Slurm lets a requeued job wait for two minutes
    wait_for 600 "end of job $job" is_field "$job" JobState COMPLETED
    say "job $job ended: $(scontrol --oneliner show job "$job" | grep -oE '(JobState|Restarts|ExitCode)=[^ ]+' | xargs)"
    grep -hE "^(stopped|launch|\[rank)" "$work/$name-$job.log" | sed "s/^/        log: /"
    check "$name: every step once, restart included" every_step_once "$name"
}

trap clean_up EXIT
start_slurm

straight one-process
preempt one-node
check "one-node: the weights of the uninterrupted run, bit for bit" same_weights one-process one-node

ASARM_PROCESSES=2 straight two-processes
preempt two-nodes --nodes=2
check "two-nodes: the weights of the uninterrupted run of two processes, bit for bit" same_weights two-processes two-nodes

job=$(train cancelled)
wait_for 120 "step 10 of job $job" reached cancelled 10
scancel "$job"
wait_for 120 "end of job $job" not_in_queue "$job"
check "job $job, cancelled while it trained, is $(job_field "$job" JobState), not requeued; newest checkpoint: $(newest cancelled)" \
    is_field "$job" JobState CANCELLED

job=$(submit failing _run_training.sh --config configs/train/smoke.yaml --output_dir "$work/failing" --optimizer.lr 0)
wait_for 120 "end of job $job" not_in_queue "$job"
check "job $job, with a mistake in its settings, is $(job_field "$job" JobState), not requeued; exit status $(job_field "$job" ExitCode)" \
    is_field "$job" JobState FAILED

options=(--num_sequences 4 --max_length 32 --samplers sequential assd)
bash _run_speculative_decoding.sh "${options[@]}" --output_dir "$work/evaluation" > "$work/evaluation.log" 2>&1
job=$(submit array --array=0-1 _run_speculative_decoding.sh "${options[@]}" --output_dir "$work/array")
wait_for 300 "end of job $job" not_in_queue "$job"
check "evaluation as an array of two jobs: the records of one process" same_records evaluation array
say "all of it holds"
