#!/bin/sh
# The main job on the embedded sample data: a sweep, its evaluation in real bytes, JPEG, the report.
# All it writes lies in demo_output/; run again, it goes on where it was interrupted.
set -eu
cd "$(dirname "$0")/.."
PYTHON=.venv/bin/python
OUT=$PWD/demo_output
began=$(date +%s)
export NTC_EXECUTOR=local NTC_TRAIN_DIR="$OUT/train_xms" NTC_RESULTS_DIR="$OUT/json_results" NTC_REPORTS_DIR="$OUT/reports"

echo "== 1/4  Train a sweep of four rates (factorized/configs/bls2017.py:tiny)"
# The experiment is named after the code: interrupted, it goes on; after a change, it starts anew.
XID=demo-$(cat configs.py launch*.py common/*.py factorized/*.py factorized/configs/*.py | cksum | cut -d " " -f 1)
if [ -e "$NTC_TRAIN_DIR/$XID/experiment.json" ]; then
  $PYTHON launch.py rerun "$XID" --jobs=2
else
  $PYTHON launch.py --main=factorized.train --config=factorized/configs/bls2017.py:tiny \
    --executor=local --jobs=2 --xid="$XID"
fi
echo "== 2/4  Evaluate every run on the held-out sample photographs, in real bytes"
$PYTHON launch_eval.py --workdirs="$NTC_TRAIN_DIR/$XID/wid=*" --dataset=sample --jobs=2
echo "== 3/4  Pillow's JPEG on the same photographs"
$PYTHON -m common.classical --dataset=sample --codec=jpeg
echo "== 4/4  Report"
$PYTHON -m common.report --dataset=sample --runs="$NTC_TRAIN_DIR/$XID/wid=*"
echo "Done in $(($(date +%s) - began)) s. Open the report in a browser:"
echo "  $NTC_REPORTS_DIR/sample/index.html"
