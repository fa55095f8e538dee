#!/usr/bin/env bash
# Stage 1: train an MSDNet with Gradient Equilibrium, then evaluate it.
#
#   bash run_GE.sh                                     the synthetic demo
#   bash run_GE.sh PRESET                             folder, cifar100, imagenet, ...; a wrong one lists all
#   DATA_ROOT=... GPUS=0,1,2,3 PROCESSES=2 SAVE=... bash run_GE.sh imagenet --workers 16
#
# What follows the preset is passed to train_GE.py (python train_GE.py --help).
set -euo pipefail

preset=demo
if [[ $# -gt 0 && $1 != -* ]]; then preset=$1; shift; fi

DATA_ROOT="${DATA_ROOT:-}"         # folder with the images (not for the demo); empty: data
GPUS="${GPUS:-}"                   # such as 0,1,2,3; empty: the first GPU, or the CPU
# PROCESSES, on CPUs: the number of processes that train; unset: at most one per core
SAVE="${SAVE:-save/$preset}"       # stage 1 goes into $SAVE/GE, stage 2 into $SAVE/IMTA

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" "$project/train_GE.py" --preset "$preset" \
    ${DATA_ROOT:+--data-root "$DATA_ROOT"} ${GPUS:+--gpu "$GPUS"} \
    --save "$SAVE/GE" "$@"
