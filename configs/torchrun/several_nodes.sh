#!/usr/bin/env bash
# Trains on all GPUs of several machines. Start it on each of them, within ten minutes:
#   NODES=4 HOST=node-a bash configs/torchrun/several_nodes.sh --data.path my.txt
# HOST is the name of one of them, which the others reach on PORT. Folders of the texts and the runs
# have to be the same everywhere: use a shared file system.
set -euo pipefail

# Which network to use, where the first that is found is not the right one:
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# What NCCL says of errors:
# export NCCL_DEBUG=WARN

exec torchrun --nnodes="$NODES" --nproc_per_node="${PROCESSES:-gpu}" \
    --rdzv_backend=c10d --rdzv_endpoint="$HOST:${PORT:-29400}" --rdzv_id=lit_gpt \
    -m lit_gpt train \
    --config configs/gpt2_124m.yaml \
    --data.path texts \
    "$@"
