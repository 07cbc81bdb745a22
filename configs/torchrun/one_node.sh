#!/usr/bin/env bash
# Trains on all GPUs of this machine. Options of `lit-gpt train` may follow, and win:
#   bash configs/torchrun/one_node.sh --data.path my.txt
# PROCESSES=2 takes as many GPUs, or processes on a machine without any.
set -euo pipefail

exec torchrun --standalone --nproc_per_node="${PROCESSES:-gpu}" -m lit_gpt train \
    --config configs/gpt2_124m.yaml \
    --data.path texts \
    "$@"
