"""How near training steps of the published models' transforms come to the matrix-product rate.

  python -m benchmarks.transforms [--models mbt2018 two_layer_syn] [--rounds 7]

A step here is analysis, hyper-analysis, hyper-synthesis, synthesis, a distortion and a stand-in for
the rate, gradients, clipping and Adam on a batch of 8 x 256 x 256. Its FLOPs are 3 x those of the
transforms' forward pass. The steps and a large matrix product (the ceiling) take turns.
`benchmarks.train_step` times the real step of a config.
"""

import argparse
import statistics
import time
from typing import Any, Callable

import tensorflow as tf

from benchmarks import ceilings
from common import profiling
from common.profiling import Stage
from common.transforms import make_transform

_ELIC = ("ElicAnalysis", {})
MODELS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
  "mbt2018": (
    ("MBT2018Analysis", dict(channels_base=192, output_channels=320)),
    ("MBT2018Synthesis", dict(channels_base=192, in_channels=320)),
  ),
  "jpegl": (_ELIC, ("JPEGLikeSynthesis", dict(kernel_size=18))),
  "two_layer_syn": (_ELIC, ("TwoLayerResSynthesis", dict(channels=(12, 3)))),
  "two_layer_syn2": (
    ("CNNAnalysis", dict(channels_base=256, output_channels=320)),
    ("TwoLayerSynthesis", dict(channels=(24, 3))),
  ),
}


def make_step(model: str, crops: tf.Tensor) -> tuple[Callable[[], float], float]:
  """The step on `crops` [B,H,W,3] in 0..255 (it returns the loss), and its FLOPs: 3 x forward."""
  (analysis_name, analysis_args), (synthesis_name, synthesis_args) = MODELS[model]
  stages = {
    "f": Stage(make_transform(analysis_name, **analysis_args), 1),
    "f_h": Stage(make_transform("HyperAnalysis"), 16),
    "g_h": Stage(make_transform("HyperSynthesis"), 64),
    "g": Stage(make_transform(synthesis_name, **synthesis_args), 16),
  }
  f, f_h, g_h, g = (stage.transform for stage in stages.values())
  variables = [v for t in (f, f_h, g_h, g) for v in t.trainable_variables]
  optimizer = tf.keras.optimizers.Adam(1e-4, jit_compile=False)
  optimizer.build(variables)

  @tf.function
  def step() -> tf.Tensor:
    with tf.GradientTape() as tape:
      y = f(crops / 255.0 - 0.5)
      z = f_h(y)
      mean, log_scale = tf.split(g_h(z + tf.random.uniform(tf.shape(z), -0.5, 0.5)), 2, axis=-1)
      x_hat = (g(y + tf.random.uniform(tf.shape(y), -0.5, 0.5)) + 0.5) * 255.0
      rate = tf.reduce_mean(log_scale + tf.square(y - mean) * tf.exp(-2 * log_scale))
      loss = rate + tf.reduce_mean(tf.square(z)) + 0.01 * tf.reduce_mean(tf.square(crops - x_hat))
    gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, variables), 1.0)
    optimizer.apply_gradients(zip(gradients, variables))
    return loss

  per_pixel = sum(cost.flops_per_pixel for cost in profiling.profile_stages(stages).values())
  pixels = crops.shape[0] * crops.shape[1] * crops.shape[2]
  return lambda: float(step()), 3 * per_pixel * pixels


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
  parser.add_argument("--rounds", type=int, default=5, help="how often each is timed")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--patch", type=int, default=256)
  args = parser.parse_args()
  crops = tf.random.uniform([args.batch, args.patch, args.patch, 3], 0, 255)
  steps = {model: make_step(model, crops) for model in args.models}
  matmul = ceilings.make_matmul_probe()
  for step, _ in steps.values():  # trace, and fill the allocator's pools
    step()
    step()
  rates: list[float] = []
  seconds: dict[str, list[float]] = {model: [] for model in steps}
  shares: dict[str, list[float]] = {model: [] for model in steps}
  for _ in range(args.rounds):
    for model, (step, flops) in steps.items():
      before = matmul()
      start = time.perf_counter()
      step()
      seconds[model].append(time.perf_counter() - start)
      after = matmul()
      shares[model].append(flops / 1e9 / seconds[model][-1] / ((before + after) / 2))
      rates += [before, after]
  print(
    f"batch {args.batch} x {args.patch} x {args.patch}, float32; {profiling.device_name()}; "
    f"float32 matrix product {statistics.median(rates):.0f} GFLOP/s (best {max(rates):.0f})"
  )
  print(f"{'':16s}{'GFLOP':>8s}{'s/step':>8s}{'min':>8s}{'max':>8s}{'of ceiling':>12s}")
  for model, (_, flops) in steps.items():
    times = seconds[model]
    print(
      f"{model:16s}{flops / 1e9:8.0f}{statistics.median(times):8.3f}{min(times):8.3f}"
      f"{max(times):8.3f}{statistics.median(shares[model]):12.1%}"
    )


if __name__ == "__main__":
  main()
