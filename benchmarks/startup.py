"""Seconds from the start of a training to its first step done, on the full configs.

  python -m benchmarks.startup [--config mshyper/configs/mbt2018.py ...] [--rounds 3]

Each start is `python -m <family>.train --config ...` in a process of its own and a new experiment
in a temporary folder: imports, the checks, the data, initial values, tracing, the first step. The
run says itself how long that took since its process began; then it is ended. Configs take turns.
"""

import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
from typing import Optional

from benchmarks import ceilings, rows

_CONFIGS = (
  "factorized/configs/bls2017.py",
  "mshyper/configs/mbt2018.py",
  "mshyper/configs/two_layer_syn.py",
)
_ROOT = pathlib.Path(__file__).resolve().parent.parent
_SECONDS = 10.0  # Asked.


def first_step(config: str, dataset: Optional[str]) -> float:
  """Seconds from the process's start to its first step done, as the run says."""
  family = pathlib.Path(config).parent.parent.name
  with tempfile.TemporaryDirectory() as folder:
    argv = [sys.executable, "-m", f"{family}.train", f"--config={config}"]
    argv.append(f"--experiments_dir={folder}")
    if dataset is not None:
      argv.append(f"--config.train_data_config.dataset={dataset}")
    process = subprocess.Popen(
      argv, cwd=_ROOT, env={**os.environ}, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    assert process.stderr is not None
    lines = []
    try:
      for line in process.stderr:
        lines.append(line)
        found = re.search(r"First step done ([0-9.]+) s", line)
        if found is not None:
          return float(found.group(1))
    finally:
      process.kill()  # Not asked to stop: it would save its state first.
      process.wait()
  raise SystemExit(f"{config} ended before its first step:\n{''.join(lines[-5:])}")


def main() -> None:
  parser = rows.parser(__doc__)
  parser.add_argument("--config", nargs="+", default=list(_CONFIGS))
  parser.add_argument("--dataset", help="to train on; default the configs' own")
  parser.add_argument("--rounds", type=int, default=3, help="how often each is started")
  args = parser.parse_args()
  seconds: dict[str, list[float]] = {config: [] for config in args.config}
  for _ in range(args.rounds):
    for config, values in seconds.items():
      values.append(first_step(config, args.dataset))
      print(f"{config:40s} {values[-1]:6.1f} s", flush=True)
  figures = [
    rows.Figure(
      12, config, values, "s", f"{_SECONDS:.0f} s", statistics.median(values) / _SECONDS, 1.0,
      at_least=False,
    )
    for config, values in seconds.items()
  ]  # fmt: skip
  rows.report(figures, ceilings.measure(), args.json)


if __name__ == "__main__":
  main()
