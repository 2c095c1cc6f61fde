"""What this machine can do at best: float32 matrix products, and copies in memory.

  python -m benchmarks.ceilings

Other benchmarks call these functions in turn with what they measure, so that a machine that is
busy with something else slows both down alike.
"""

import argparse
import time
from typing import Callable

from benchmarks import rows

_COPY_BYTES = 2**28


def make_matmul_probe() -> Callable[[], float]:
  """Returns a function that multiplies two large matrices and returns its GFLOP/s."""
  from common import profiling

  product, flops = profiling.make_matmul()
  product().numpy()

  def probe() -> float:
    start = time.perf_counter()
    product().numpy()
    return flops / (time.perf_counter() - start) / 1e9

  return probe


def make_copy_probe(num_bytes: int = _COPY_BYTES) -> Callable[[], float]:
  """Returns a function that negates a large array into another and returns its GB/s.

  Bytes read and bytes written both count.
  """
  import tensorflow as tf

  source = tf.zeros([num_bytes // 4])

  @tf.function(autograph=False)
  def copy() -> tf.Tensor:
    return -source

  copy()

  def probe() -> float:
    start = time.perf_counter()
    result = copy()
    result[:1].numpy()
    return 2 * num_bytes / (time.perf_counter() - start) / 1e9

  return probe


def measure(rounds: int = 7) -> dict[str, list[float]]:
  """Both ceilings by name, for benchmarks whose work is in other processes."""
  probes = {rows.MATMUL: make_matmul_probe(), rows.COPY: make_copy_probe()}
  values: dict[str, list[float]] = {name: [] for name in probes}
  for _ in range(rounds):
    for name, probe in probes.items():
      values[name].append(probe())
  return values


def main() -> None:
  """Prints both ceilings."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=15, help="how often each is measured")
  args = parser.parse_args()
  for name, values in measure(args.rounds).items():
    print(f"{name:36s} {rows.spread(values, 1)}")


if __name__ == "__main__":
  main()
