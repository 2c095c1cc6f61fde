#!/bin/sh
# CompressAI in a virtual environment of its own, for benchmarks/peer.py: about 6 GB, torch's most.
#   benchmarks/setup_peer.sh [FOLDER]        default .venv-peer
set -eu
cd "$(dirname "$0")/.."
FOLDER=${1:-.venv-peer}
PYTHON=${PYTHON:-python3}
if [ ! -x "$FOLDER/bin/python" ]; then
  if command -v uv > /dev/null; then uv venv -q --python 3.11 "$FOLDER"; else "$PYTHON" -m venv "$FOLDER"; fi
fi
if command -v uv > /dev/null; then
  uv pip install -q --python "$FOLDER/bin/python" "compressai==1.2.8" "numpy<2"
else
  "$FOLDER/bin/python" -m pip install -q "compressai==1.2.8" "numpy<2"
fi
"$FOLDER/bin/python" -c "import compressai, torch; print('CompressAI', compressai.__version__, 'torch', torch.__version__)"
