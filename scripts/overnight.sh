#!/bin/sh
# Every system of this project, trained, evaluated in real bytes and drawn: a night on two cores.
#   scripts/overnight.sh [SWEEP [XID]]      sweeps/overnight.py, or sweeps/overnight.py:trial
# Needs the data sets cid22-train, cid22-valid and kodak (configs.py, python -m common.data list).
# Run again with the same words, it goes on where it was interrupted.
set -eu
cd "$(dirname "$0")/.."
PYTHON=.venv/bin/python
SWEEP=${1:-sweeps/overnight.py}
XID=${2:-overnight}
export NTC_EXECUTOR=local
TRAIN_DIR=$($PYTHON -c "import configs; print(configs.TRAIN_DIR)")

echo "== 1/4  Train"
if [ -e "$TRAIN_DIR/$XID/experiment.json" ]; then
  $PYTHON launch.py rerun "$XID" --jobs=2
else
  $PYTHON launch.py --sweep="$SWEEP" --xid="$XID" --jobs=2
fi
for DATASET in kodak cid22-valid; do
  echo "== 2/4  Evaluate on $DATASET"
  $PYTHON launch_eval.py --workdirs="$TRAIN_DIR/$XID/wid=*" --dataset=$DATASET --jobs=2 \
    --args="--profile --save_pictures"
  $PYTHON -m factorized.vbq_eval --workdir "$TRAIN_DIR/$XID"/wid=*-vae-* --calibration=cid22-train \
    --dataset=$DATASET
  echo "== 3/4  Classical codecs on $DATASET"
  $PYTHON -m common.classical --dataset=$DATASET \
    --codec=jpeg,jpeg-optimized,jpeg444-optimized,webp,jpeg2000,avif,jxl,jpegli,mozjpeg,mozjpeg-flat,bpg,vtm
  echo "== 4/4  Report of $DATASET"
  $PYTHON -m common.report --dataset=$DATASET --runs="$TRAIN_DIR/$XID"
done
