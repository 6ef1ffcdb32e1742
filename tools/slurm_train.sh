#!/usr/bin/env bash
# Trains as a Slurm job, one task per GPU.
#
#   GPUS=8 bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of tools/train.py ...]
#
# GPUS: in all (4); GPUS_PER_NODE (4); CPUS_PER_TASK (5); SRUN_ARGS: more options of srun;
# MASTER_PORT (29500); PYTHON: the interpreter.
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

PARTITION=$1
JOB_NAME=$2
CONFIG=$3
PYTHON=${PYTHON:-python}
GPUS=${GPUS:-4}
GPUS_PER_NODE=${GPUS_PER_NODE:-4}
CPUS_PER_TASK=${CPUS_PER_TASK:-5}
read -r -a SRUN_OPTIONS <<< "${SRUN_ARGS:-}"

set -x
exec srun -p "$PARTITION" \
    --job-name="$JOB_NAME" \
    --gres="gpu:$GPUS_PER_NODE" \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="$CPUS_PER_TASK" \
    --kill-on-bad-exit=1 \
    ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} \
    "$PYTHON" -u "$(dirname "$0")/train.py" "$CONFIG" --launcher=slurm "${@:4}"
