#!/bin/sh
# Makes .venv with the pinned requirements. Runs again only when they change.
#   scripts/setup_venv.sh [requirements files, default: requirements.txt requirements-dev.txt]
# PYTHON=/path/to/python chooses the interpreter; otherwise Python 3.9 to 3.11 is looked for, then `uv`.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- requirements.txt requirements-dev.txt
VENV=.venv
STAMP=$VENV/.requirements

supported() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 11))' >/dev/null 2>&1
}

wanted=$(for f in "$@"; do echo "== $f"; cat "$f"; done)
if [ -x "$VENV/bin/python" ] && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ]; then
  exit 0
fi
rm -f "$STAMP" 2>/dev/null || true

if ! { [ -x "$VENV/bin/python" ] && supported "$VENV/bin/python"; }; then
  rm -rf "$VENV"
  found=""
  if [ -n "${PYTHON:-}" ] && ! { command -v "$PYTHON" >/dev/null 2>&1 && supported "$PYTHON"; }; then
    echo "PYTHON=$PYTHON is no Python 3.9 to 3.11 with venv; looking for another." >&2
  fi
  for python in ${PYTHON:-} python3.11 python3.10 python3.9 python3 python; do
    if command -v "$python" >/dev/null 2>&1 && supported "$python"; then found=$python; break; fi
  done
  if [ -n "$found" ]; then
    echo "Making $VENV with $("$found" --version) ..."
    "$found" -m venv "$VENV"
  elif command -v uv >/dev/null 2>&1; then
    echo "No Python 3.9 to 3.11 with venv found; uv makes $VENV with Python 3.11 ..."
    uv venv --quiet --seed --python 3.11 "$VENV"
  else
    cat >&2 <<'TEXT'
No Python 3.9, 3.10 or 3.11 was found (TensorFlow 2.14 runs on no other), and no `uv` either.
Install one of them, then run this again:
  Debian, Ubuntu   apt install python3.11 python3.11-venv
  conda            conda create -n codec python=3.11 && conda activate codec
  uv               pip install uv
or name an interpreter: make venv PYTHON=/path/to/python3.11
TEXT
    exit 1
  fi
fi

echo "Installing the pinned packages into $VENV (about 2 GB; a few minutes the first time) ..."
for f in "$@"; do
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$f"
done
printf '%s\n' "$wanted" > "$STAMP"
echo "$VENV is ready."
