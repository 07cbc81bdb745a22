#!/usr/bin/env bash
# Trains on 4 nodes with 8 GPUs each. Options of `lit-gpt train` may follow, and win:
#   sbatch configs/slurm/several_nodes.sh --data.path my.txt
# The texts, the cache and the runs have to lie on a file system that all nodes share.
#SBATCH --job-name=lit_gpt
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# A task for each GPU, and no --gpus-per-task: each must see all GPUs of its node.
# Five minutes before the time is up, the run saves and requeues this job, which then resumes.
set -euo pipefail
# shellcheck source=/dev/null
source .venv/bin/activate

# Which network to use, where the first that is found is not the right one:
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# What NCCL says of errors:
# export NCCL_DEBUG=WARN

# srun takes no --cpus-per-task from sbatch, and one task that fails should end them all.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 lit-gpt train \
    --config configs/gpt2_124m.yaml \
    --data.path texts \
    "$@"
