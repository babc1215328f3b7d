#!/usr/bin/env bash
# A run on several nodes of a SLURM cluster, resumed by itself after preemption or a time limit:
#   sbatch launch/configs/slurm.sh -m launch.train /data/imagenet --model resnet50 --aug-splits 3 \
#       --split-bn --output /shared/run
# --output must be a folder that all nodes see. Change the numbers below, or pass them to sbatch.

#SBATCH --job-name=sync_splitbn
# Machines that take part.
#SBATCH --nodes=2
# One launcher a node: it starts the ranks of the node itself.
#SBATCH --ntasks-per-node=1
# GPUs of a node, one rank each.
#SBATCH --gpus-per-node=8
# Cores for the ranks of a node and their data workers.
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# The job may start again under the same number.
#SBATCH --requeue
# Appended to, so that the log of the part before is kept.
#SBATCH --open-mode=append
# Two minutes before the end SLURM tells this script, which then has time to save.
#SBATCH --signal=B:USR1@120

set -uo pipefail

requeue() {
    # The ranks finish their step and write a checkpoint. scancel reaches them through SLURM; a
    # signal to srun itself would kill them.
    scancel --signal=TERM "$SLURM_JOB_ID.0"
    wait "$job"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
# Not TERM: a job that its user cancels must not come back.
trap requeue USR1

# Address of the first node, at which all ranks meet.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
[ -n "$head_node" ] || { echo "scontrol must name the nodes of the job, got none" >&2; exit 1; }
ranks=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
# Two jobs may share a node.
port=$((20000 + SLURM_JOB_ID % 10000))

# Each node fills in its own number, hence the single quotes. The cores of sbatch are passed on,
# which srun does not do by itself; after the first node ends, the others have a minute.
# shellcheck disable=SC2016
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=60 bash -c '
    exec accelerate launch --config_file launch/configs/several_nodes.yaml \
        --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$1" \
        --main_process_ip "$2" --main_process_port "$3" "${@:4}" --resume auto
' bash "$ranks" "$head_node" "$port" "$@" &
job=$!
wait "$job"
