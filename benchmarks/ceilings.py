"""What this machine can do at best: float32 matrix products, and copies in memory.

  python -m benchmarks.ceilings

Other benchmarks call these functions in turn with what they measure, so that a machine that is
busy with something else slows both down alike.
"""

import statistics
import time
from typing import Callable

import tensorflow as tf

from common import profiling

_COPY_BYTES = 2**28


def make_matmul_probe(size: int = profiling.MATRIX_SIZE) -> Callable[[], float]:
  """Returns a function that multiplies two size x size matrices and returns its GFLOP/s."""
  product, flops = profiling.make_matmul(size)
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
  source = tf.zeros([num_bytes // 4])

  @tf.function
  def copy() -> tf.Tensor:
    return -source

  copy()

  def probe() -> float:
    start = time.perf_counter()
    result = copy()
    result[:1].numpy()
    return 2 * num_bytes / (time.perf_counter() - start) / 1e9

  return probe


def main() -> None:
  """Prints both ceilings."""
  for label, unit, probe in (
    ("float32 matrix product", "GFLOP/s", make_matmul_probe()),
    ("memory copy, read + write", "GB/s", make_copy_probe()),
  ):
    values = [probe() for _ in range(15)]
    print(f"{label:28s} median {statistics.median(values):7.1f}  best {max(values):7.1f} {unit}")


if __name__ == "__main__":
  main()
