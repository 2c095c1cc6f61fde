"""How near the train step comes to this machine's matrix-product rate, and to the seed's code.

  python -m benchmarks.train_step                       (the five full configs)
  python -m benchmarks.train_step --config mshyper/configs/mbt2018.py mshyper/configs/jpegl.py
  python -m benchmarks.train_step --config factorized/configs/bls2017.py --kernels variable

Runs in turn, in one process: the step that `train` runs for each config (transforms, priors,
gradients, clipping, Adam), a large matrix product (the ceiling), and for bls2017 and mbt2018 the
same model of tensorflow_compression's layers and entropy models (benchmarks/plain.py). A step's
FLOPs are 3 x those of the transforms' forward pass; what the priors and Adam cost comes on top. A
minute or two a config.

The code that shallow-ntc's authors published is not run here; its seconds were measured on a
machine whose float32 matrix product ran at 205 GFLOP/s (SEED_SECONDS; the middle where a range was
given). They are scaled by that rate over the rate of this run, as if all of it ran at the speed of
matrix products. Beside them stand tensorflow_compression's layers, which were run: as most programs
have them (--kernels rdft, the default), and at their best (--kernels variable).
"""

from __future__ import annotations

import importlib
import pathlib
import statistics
import time
from typing import Any, Callable

import numpy as np

from benchmarks import ceilings, plain, rows
from common import hyper

# The published code's seconds a step, from and to, and what each row asks.
SEED_SECONDS = {
  "factorized/configs/bls2017.py": (3.7, 3.7, 1.7),
  "mshyper/configs/mbt2018.py": (6.0, 7.2, 1.7),
  "mshyper/configs/jpegl.py": (5.6, 5.6, 1.1),
  "mshyper/configs/two_layer_syn.py": (5.6, 5.6, 1.1),
  "mshyper/configs/two_layer_syn2.py": (4.3, 4.3, 1.2),
}
# Of matrix products on that machine.
SEED_GFLOPS = 205.0
_SHARE = 0.65  # Asked of every config.


def make_step(family: str, config: Any, crops: np.ndarray) -> tuple[Callable[[], float], float]:
  """The project's own step on `crops` (returns the loss), and its FLOPs: 3 x forward."""
  from common import profiling, train_lib

  build = importlib.import_module(f"{family}.codec").build
  state = train_lib.TrainState(build(config.model_config))
  step = train_lib.make_train_step(state, config)
  per_pixel = sum(
    cost.flops_per_pixel for cost in profiling.profile_stages(state.codec.stages()).values()
  )
  arguments = (np.int32(0), np.float32(1e-4), np.float32(config.model_config.rd_lambda))

  def run() -> float:
    with train_lib.graph_passes():
      return float(step(crops, *arguments)["loss"])

  return run, 3 * per_pixel * crops[..., 0].size


def main() -> None:
  parser = rows.parser(__doc__)
  parser.add_argument("--config", nargs="+", default=list(SEED_SECONDS))
  parser.add_argument("--rounds", type=int, default=15, help="how often each is timed")
  parser.add_argument(
    "--kernels",
    choices=("rdft", "variable"),
    default="rdft",
    help="how tensorflow_compression's layers keep their kernels; rdft is their default",
  )
  args = parser.parse_args()
  steps: dict[str, tuple[Callable[[], float], float]] = {}
  for path in args.config:
    config = hyper.load(path).get_config()
    batch, patch = config.train_data_config.batchsize, config.train_data_config.patchsize
    crops = np.random.default_rng(0).integers(0, 256, [batch, patch, patch, 3], np.uint8)
    family = pathlib.Path(path).parent.parent.name
    steps[path] = make_step(family, config, crops)
    if plain.is_known(config):
      steps[f"{path} of tfc"] = (plain.make_step(config, crops, args.kernels), steps[path][1])
  matmul, copy = ceilings.make_matmul_probe(), ceilings.make_copy_probe()

  bandwidths: list[float] = []
  seconds: dict[str, list[float]] = {label: [] for label in steps}
  rates: dict[str, list[float]] = {label: [] for label in steps}  # Around each step, GFLOP/s.
  for step, _ in steps.values():  # trace, and fill the allocator's pools
    step()
    step()
  for _ in range(args.rounds):
    for label, (step, _) in steps.items():
      before = matmul()
      start = time.perf_counter()
      step()
      seconds[label].append(time.perf_counter() - start)
      rates[label].append((before + matmul()) / 2)
    bandwidths.append(copy())

  print(f"{'':40s}{'GFLOP':>8s}{'s/step':>8s}{'min':>8s}{'max':>8s}{'GFLOP/s':>9s}{'share':>8s}")
  figures = []
  for label, (_, flops) in steps.items():
    times, gflop = seconds[label], flops / 1e9
    median = statistics.median(times)
    # Each round's own ratio, so that a machine that is busy for a while shifts both.
    products = [s * rate for s, rate in zip(times, rates[label])]  # GFLOP in the time of a step.
    share = statistics.median(gflop / p for p in products)
    print(
      f"{label:40s}{gflop:8.0f}{median:8.3f}{min(times):8.3f}{max(times):8.3f}"
      f"{gflop / median:9.0f}{share:8.1%}"
    )
    rate = statistics.median(rates[label])
    against = f"{gflop:.0f} GFLOP at {rate:.0f} GFLOP/s: {gflop / rate:.3f} s"
    if label not in args.config:
      continue
    figures.append(rows.Figure(1, label, times, "s", against, share, _SHARE))
    if label not in SEED_SECONDS:
      continue
    least, most, asked = SEED_SECONDS[label]
    faster = statistics.median(SEED_GFLOPS / p for p in products)  # Than a step of one second.
    middle = (least + most) / 2
    against = f"{middle:.1f} s x {SEED_GFLOPS:.0f} / {rate:.0f} GFLOP/s: "
    against += f"{middle * SEED_GFLOPS / rate:.3f} s"
    if least != most:
      against += f" ({least} s: {least * faster:.2f}, {most} s: {most * faster:.2f})"
    if (peer := seconds.get(f"{label} of tfc")) is not None:
      ratio = statistics.median(theirs / ours for theirs, ours in zip(peer, times))
      against += f"; in turn, tfc's layers ({args.kernels}) {rows.spread(peer)} s: {ratio:.2f}"
    figures.append(rows.Figure(2, label, times, "s", against, middle * faster, asked))
  figures.sort(key=lambda figure: figure.row)
  all_rates = [rate for values in rates.values() for rate in values]
  rows.report(figures, {rows.MATMUL: all_rates, rows.COPY: bandwidths}, args.json)


if __name__ == "__main__":
  main()
