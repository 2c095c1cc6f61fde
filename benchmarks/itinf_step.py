"""A step of iterative inference beside its own arithmetic at the matrix-product rate.

  python -m benchmarks.itinf_step [--dataset kodak] [--rounds 15]

The compiled step that `common.itinf_lib` runs: SGA on the full-size two_layer_syn, untrained, from
a DCT, on the data set's first picture alone. The ceiling is 3 x the forward FLOPs of the synthesis
and the hyper-synthesis (forward, and as much again each for the gradients of inputs and of weights)
at the rate of a matrix product in the same run. Weights are frozen, so 2 x would do: that ratio is
printed, too.
"""

import statistics
import time

from benchmarks import ceilings, decode, rows
from common import data, hyper

_MODEL = "mshyper/configs/two_layer_syn.py"
_CONFIG = "mshyper/configs/itinf.py"


def main() -> None:
  parser = rows.parser(__doc__)
  parser.add_argument("--dataset", default="sample", help="its first picture is optimised")
  parser.add_argument("--rounds", type=int, default=15, help="how often the step is timed")
  args = parser.parse_args()
  from common import itinf_lib, profiling, rd

  name, image = data.load_eval_images(args.dataset)[0]
  x = rd.to_batch(image)
  codec = decode.make_codec(_MODEL, True, x)
  rd_lambda = float(hyper.load(_MODEL).get_config().model_config.rd_lambda)
  optimizer = itinf_lib.LatentOptimizer(codec, hyper.load(_CONFIG).get_config(), rd_lambda)
  state, step = optimizer.prepare(x)
  matmul, copy = ceilings.make_matmul_probe(), ceilings.make_copy_probe()
  seconds: list[float] = []
  rates: list[float] = []
  bandwidths: list[float] = []
  before = matmul()
  for turn in range(args.rounds + 2):
    began = time.perf_counter()
    state, terms = step(state, x, *optimizer.scheduled(turn))
    terms["bpp"].numpy()
    took, after = time.perf_counter() - began, matmul()
    if turn >= 2:  # The first calls fill the allocator's pools.
      seconds.append(took)
      rates.append((before + after) / 2)
      bandwidths.append(copy())
    before = after
  costs = profiling.profile_stages(codec.stages())
  pixels = rd.padded_size(image.shape[0], 64) * rd.padded_size(image.shape[1], 64)
  forward = pixels * (costs["g"].flops_per_pixel + costs["g_h"].flops_per_pixel) / 1e9
  ratio = statistics.median(s * rate / (3 * forward) for s, rate in zip(seconds, rates))
  rate = statistics.median(rates)
  print(f"{name} {image.shape[0]}x{image.shape[1]} (HxW), {forward:.1f} GFLOP forward")
  print(f"step {rows.spread(seconds)} s: {ratio:.2f} x of 3 forwards, {1.5 * ratio:.2f} x of 2")
  against = f"{3 * forward:.0f} GFLOP at {rate:.0f} GFLOP/s: {3 * forward / rate:.3f} s"
  figure = rows.Figure(8, f"{name}", seconds, "s", against, ratio, 2.0, at_least=False)
  rows.report([figure], {rows.MATMUL: rates, rows.COPY: bandwidths}, args.json)


if __name__ == "__main__":
  main()
