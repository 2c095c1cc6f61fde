"""How near the train step comes to this machine's matrix-product rate.

  python -m benchmarks.train_step --config factorized/configs/bls2017.py

Runs, in turn and in one process, the step made of this project's layers, the same step made of
tensorflow_compression's `SignalConv2D` and `GDN` ("plain"), and a large matrix product (the
ceiling). A step's FLOPs are 3 x those of the transforms' forward pass. About two minutes.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, Callable

import tensorflow as tf
import tensorflow_compression as tfc

from benchmarks import ceilings
from common.profiling import device_name
from common.transforms import make_transform

# Analysis and synthesis: callables with trainable_variables.
Transforms = tuple[Any, Any]


def make_bls2017(num_filters: int) -> Transforms:
  """The transforms of factorized/configs/bls2017.py."""
  return (
    make_transform("BLS2017Analysis", num_filters=num_filters),
    make_transform("BLS2017Synthesis", num_filters=num_filters),
  )


def make_plain_bls2017(num_filters: int) -> Transforms:
  """The same of tensorflow_compression's layers."""
  conv: dict[str, Any] = dict(padding="same_zeros", kernel_parameter="variable")

  def down(kernel_size: int, stride: int, use_bias: bool = True):
    return tfc.SignalConv2D(
      num_filters, kernel_size, corr=True, strides_down=stride, use_bias=use_bias, **conv
    )

  def up(filters: int, kernel_size: int, stride: int):
    return tfc.SignalConv2D(
      filters, kernel_size, corr=False, strides_up=stride, use_bias=True, **conv
    )

  analysis = tf.keras.Sequential(
    [down(9, 4), tfc.GDN(), down(5, 2), tfc.GDN(), down(5, 2, use_bias=False)]
  )
  synthesis = tf.keras.Sequential(
    [
      up(num_filters, 5, 2),
      tfc.GDN(inverse=True),
      up(num_filters, 5, 2),
      tfc.GDN(inverse=True),
      up(3, 9, 4),
    ]
  )
  analysis.build([None, None, None, 3])
  synthesis.build([None, None, None, num_filters])
  return analysis, synthesis


_MODELS = {"bls2017": (make_bls2017, make_plain_bls2017)}


def make_step(transforms: Transforms, image: tf.Tensor) -> Callable[[], float]:
  """Returns a function that makes one step of training on `image` and returns the loss.

  Uniform noise on the latents, mean squared error, global-norm clipping, Adam.
  """
  analysis, synthesis = transforms
  variables = [*analysis.trainable_variables, *synthesis.trainable_variables]
  optimizer = tf.keras.optimizers.Adam(1e-4, jit_compile=False)
  optimizer.build(variables)

  @tf.function
  def step(image: tf.Tensor) -> tf.Tensor:
    with tf.GradientTape() as tape:
      y = analysis(image / 255 - 0.5)
      reconstruction = synthesis(y + tf.random.uniform(tf.shape(y), -0.5, 0.5))
      loss = tf.reduce_mean(tf.math.squared_difference(image, (reconstruction + 0.5) * 255))
    gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, variables), 1.0)
    optimizer.apply_gradients(zip(gradients, variables))
    return loss

  return lambda: float(step(image))


def forward_flops(transforms: Transforms, batch_size: int, patch_size: int) -> int:
  """FLOPs of analysis and synthesis for a whole batch."""
  analysis, synthesis = transforms
  latent_size = analysis.output_size(patch_size, patch_size)
  return batch_size * (analysis.flops(patch_size, patch_size) + synthesis.flops(*latent_size))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", default="factorized/configs/bls2017.py")
  parser.add_argument("--num_filters", type=int, default=256)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--patch_size", type=int, default=256)
  parser.add_argument("--rounds", type=int, default=15, help="how often each is timed")
  args = parser.parse_args()
  name = Path(args.config).stem
  if name not in _MODELS:
    parser.error(f"no transforms for {args.config!r}; known: {', '.join(sorted(_MODELS))}")

  make, make_plain = _MODELS[name]
  ours, plain = make(args.num_filters), make_plain(args.num_filters)
  gflop = 3 * forward_flops(ours, args.batch_size, args.patch_size) / 1e9
  image = tf.random.uniform([args.batch_size, args.patch_size, args.patch_size, 3], 0, 255)
  steps = {"this project": make_step(ours, image), "plain (tfc)": make_step(plain, image)}
  matmul, copy = ceilings.make_matmul_probe(), ceilings.make_copy_probe()

  rates: list[float] = []
  bandwidths: list[float] = []
  seconds: dict[str, list[float]] = {label: [] for label in steps}
  shares: dict[str, list[float]] = {label: [] for label in steps}
  for step in steps.values():  # trace, and fill the allocator's pools
    step()
    step()
  for _ in range(args.rounds):
    for label, step in steps.items():
      before = matmul()
      start = time.perf_counter()
      step()
      seconds[label].append(time.perf_counter() - start)
      after = matmul()
      shares[label].append(gflop / seconds[label][-1] / ((before + after) / 2))
      rates += [before, after]
    bandwidths.append(copy())

  print(
    f"{name}: batch {args.batch_size} x {args.patch_size} x {args.patch_size}, "
    f"{args.num_filters} filters, float32, {gflop:.0f} GFLOP a step; {device_name()}"
  )
  print(
    f"ceilings: float32 matrix product {statistics.median(rates):.0f} GFLOP/s "
    f"(best {max(rates):.0f}), memory copy {statistics.median(bandwidths):.0f} GB/s"
  )
  print(
    f"{'':14s}{'s/step':>8s}{'min':>8s}{'max':>8s}{'GFLOP/s':>9s}{'of ceiling':>12s}{'best':>7s}"
  )
  for label, times in seconds.items():
    median = statistics.median(times)
    print(
      f"{label:14s}{median:8.3f}{min(times):8.3f}{max(times):8.3f}{gflop / median:9.0f}"
      f"{statistics.median(shares[label]):12.1%}{gflop / min(times) / max(rates):7.1%}"
    )
  speedup = statistics.median(
    slow / fast for fast, slow in zip(seconds["this project"], seconds["plain (tfc)"])
  )
  print(f"this project is {speedup:.2f}x as fast as plain")


if __name__ == "__main__":
  main()
