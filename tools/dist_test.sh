#!/usr/bin/env bash
# Tests with one process per GPU, on one machine or several; without a GPU the processes share
# the CPU.
#
#   bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py ...]
#
# Several machines: run it on each, with NNODES (how many), NODE_RANK (which, from 0) and
# MASTER_ADDR (address of the first). PORT: of the first machine; by default 29500, on a single
# machine one that is free, so that two jobs do not meet. PYTHON: the interpreter;
# by default python, or that of `make install` where python has no torch.
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

CONFIG=$1
CHECKPOINT=$2
GPUS=$3
MADE=$(dirname "$0")/../.venv/bin/python
HAS_TORCH='import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    if [ -x "$MADE" ] && ! "$PYTHON" -c "$HAS_TORCH" 2>/dev/null; then
        PYTHON=$MADE
    fi
fi
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
if [ -z "${PORT:-}" ]; then
    PORT=29500
    if [ "$NNODES" = 1 ]; then
        PORT=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    fi
fi

exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$NNODES" \
    --node_rank="$NODE_RANK" \
    --master_addr="$MASTER_ADDR" \
    --nproc_per_node="$GPUS" \
    --master_port="$PORT" \
    "$(dirname "$0")/test.py" \
    "$CONFIG" \
    "$CHECKPOINT" \
    --launcher pytorch \
    "${@:4}"
