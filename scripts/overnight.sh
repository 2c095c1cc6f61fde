#!/bin/sh
# Every system of this project, trained, evaluated in real bytes and drawn: a night on two cores.
#   scripts/overnight.sh [SWEEP [XID]]      sweeps/overnight.py, or sweeps/overnight.py:trial
# Needs the data sets cid22-train, cid22-valid and kodak (configs.py, python -m common.data list).
# Run again with the same words, it goes on where it was interrupted.
# REPORT=docs/report scripts/overnight.sh writes what is committed there; without it, the same files
# go to reports/<XID>: a page a data set, and the results that it is drawn from.
set -eu
cd "$(dirname "$0")/.."
PYTHON=.venv/bin/python
SWEEP=${1:-sweeps/overnight.py}
XID=${2:-overnight}
REPORT=${REPORT:-reports/$XID}
export NTC_EXECUTOR=local
TRAIN_DIR=$($PYTHON -c "import configs; print(configs.TRAIN_DIR)")
RESULTS_DIR=$($PYTHON -c "import configs; print(configs.RESULTS_DIR)")

echo "== 1/4  Train"
if [ -e "$TRAIN_DIR/$XID/experiment.json" ]; then
  $PYTHON launch.py rerun "$XID" --jobs=2
else
  $PYTHON launch.py --sweep="$SWEEP" --xid="$XID" --jobs=2
fi
for DATASET in kodak cid22-valid; do
  # One at a time, for the sake of the seconds that are recorded.
  echo "== 2/4  Evaluate on $DATASET"
  $PYTHON -m factorized.vbq_eval --workdir "$TRAIN_DIR/$XID"/wid=*-vae-* --calibration=cid22-train \
    --dataset=$DATASET --profile
  $PYTHON launch_eval.py --workdirs="$TRAIN_DIR/$XID/wid=*" --skip='wid=*-vae-*' \
    --dataset=$DATASET --jobs=1 --args="--profile --save_pictures"
  echo "== 3/4  Classical codecs on $DATASET"
  $PYTHON -m common.classical --dataset=$DATASET --jobs=1 \
    --qualities=10,30,50,70,90 --codec=jpeg,jpeg-optimized,webp,jpeg2000,avif,jxl,jpegli,mozjpeg,bpg,vtm
  echo "== 4/4  Report of $DATASET"
  $PYTHON -m common.publish --dataset=$DATASET --runs="$TRAIN_DIR/$XID" --out="$REPORT/results"
  $PYTHON -m common.report --dataset=$DATASET --runs="$TRAIN_DIR/$XID" \
    --results_dir="$REPORT/results" --pictures_dir="$RESULTS_DIR" --out="$REPORT/$DATASET" --compact \
    --title="$DATASET: every system, trained for minutes on two cores" \
    $([ "$DATASET" = kodak ] && echo --crop=kodim23.png:250,130,192 --crop_bpp=0.4)
done
$PYTHON -m common.publish --check "$REPORT"
