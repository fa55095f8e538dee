#!/usr/bin/env bash
# Stage 2: new classifiers with ISC and One-for-all distillation on the network of stage 1, then evaluate them.
#
#   bash run_IMTA.sh                                   the synthetic demo, after bash run_GE.sh
#   bash run_IMTA.sh PRESET                             folder, cifar100, imagenet, ...; a wrong one lists all
#   DATA_ROOT=... GPUS=0,1,2,3 PROCESSES=2 SAVE=... bash run_IMTA.sh imagenet --workers 16
#
# What follows the preset is passed to train_IMTA.py (python train_IMTA.py --help).
set -euo pipefail

preset=demo
if [[ $# -gt 0 && $1 != -* ]]; then preset=$1; shift; fi

DATA_ROOT="${DATA_ROOT:-}"         # empty: where stage 1 read its images
GPUS="${GPUS:-}"                   # such as 0,1,2,3; empty: the first GPU, or the CPU
# PROCESSES, on CPUs: the number of processes that train; unset: at most one per core
SAVE="${SAVE:-save/$preset}"       # stage 1 is read from $SAVE/GE, stage 2 goes into $SAVE/IMTA

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" "$project/train_IMTA.py" --preset "$preset" \
    ${DATA_ROOT:+--data-root "$DATA_ROOT"} ${GPUS:+--gpu "$GPUS"} \
    --save "$SAVE/IMTA" "$@"
