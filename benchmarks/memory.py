"""Peak memory of evaluating one large picture: compress, decompress, compare, measure.

  python -m benchmarks.memory [--size 2048x3072] [--config mshyper/configs/mbt2018.py ...]

Each config's full-size model, untrained, in a process of its own; the photograph of the data set
`sample`, mirrored to the size. The first row is a process that has only loaded everything.
"""

import importlib
import pathlib
import re
import resource
import subprocess
import sys
import time

from benchmarks import ceilings, rows

CONFIGS = (
  "factorized/configs/bls2017.py",
  "factorized/configs/bls2017_vae.py",
  "mshyper/configs/mbt2018.py",
  "mshyper/configs/jpegl.py",
  "mshyper/configs/two_layer_syn.py",
  "mshyper/configs/two_layer_syn2.py",
  "ljpeg/configs/ljpeg.py",
)
_GIGABYTES = 4.0  # Asked.


def measure(config: str, height: int, width: int) -> tuple[float, float]:
  """In a process of its own: peak resident memory in GB, and seconds of the evaluation."""
  code = (
    "from benchmarks.memory import measure_here; "
    f"print(*measure_here({config!r}, {height}, {width}))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f"{config}: {done.stderr.strip().splitlines()[-1]}")
  gigabytes, seconds = done.stdout.split()[-2:]
  return float(gigabytes), float(seconds)


def measure_here(config: str, height: int, width: int) -> tuple[float, float]:
  """The same in this process; a height of 0 for no evaluation."""
  from common import eval_lib, hyper

  family = config.split("/")[0]
  unit = hyper.make_work_unit(hyper.load(config), family, "train")
  build = importlib.import_module(f"{family}.codec").build
  _, small = eval_lib.sample_image((256, 256))
  codec = eval_lib.untrained_codec(unit, build, small)
  began = time.perf_counter()
  if height:
    _, image = eval_lib.sample_image((height, width))
    eval_lib.record(codec, "sample", image, "bitstream")
  seconds = time.perf_counter() - began
  return peak() / (1 << 30), seconds


def peak() -> int:
  """Bytes of memory that this process had at most. ru_maxrss would count its parent's as well,
  from before the program began."""
  try:
    found = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
  except OSError:
    found = None
  if found is not None:
    return int(found.group(1)) << 10
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
  parser = rows.parser(__doc__)
  parser.add_argument("--size", default="2048x3072", help="height x width")
  parser.add_argument("--config", nargs="+", default=CONFIGS)
  args = parser.parse_args()
  height, width = map(int, args.size.split("x"))
  print(f"{'model':40s} {'loaded':>10s} {args.size:>12s} {'seconds':>8s}")
  figures = []
  for config in args.config:
    loaded, _ = measure(config, 0, 0)
    peak, seconds = measure(config, height, width)
    print(f"{config:40s} {loaded:7.2f} GB {peak:9.2f} GB {seconds:8.1f}", flush=True)
    label, against = f"{config}, {args.size}", f"{_GIGABYTES:.0f} GB"
    share = peak / _GIGABYTES
    figures.append(rows.Figure(13, label, [peak], "GB", against, share, 1.0, at_least=False))
  rows.report(figures, ceilings.measure(), args.json)


if __name__ == "__main__":
  main()
