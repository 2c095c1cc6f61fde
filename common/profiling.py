"""What a model costs: FLOPs per image pixel, parameters, and seconds, stage by stage.

FLOPs are plain arithmetic over the layers' shapes, two for each multiply-add, for the layers as
formulas and not as they happen to be run. A convolution has kernel^2 x in x out multiply-adds for
each position of its smaller side, GDN has channels^2 for each position.

Published numbers (187583 FLOPs per pixel for the analysis of Minnen et al. 2018, 187585 for its
synthesis, 2433 for the JPEG-like synthesis) come from TensorFlow's graph profiler, which adds one
FLOP for each addition of a bias or of GDN's beta, and one for each division or product of a GDN:
`elementwise=True` counts these too and gives 187582.25, 187584 and 2433. (What is left over, 0.84
for an image of 768x512, is three operations on each entry of GDN's gamma, once an image.) Without
them the counts are 187392, 187392 and 2430.
"""

import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple

import tensorflow as tf

from common.layers import Layer

# Any multiple of all downsampling factors gives the same count per pixel.
_HEIGHT, _WIDTH = 512, 768


class Stage(NamedTuple):
  """A part of a model, and where it works.

  Attributes:
    transform: the layers.
    scale: the image's size over the size of the stage's input: 1 for an analysis transform, 16 for
      the synthesis transform from latents that are 16 times smaller.
  """

  transform: Layer
  scale: int


class StageCost(NamedTuple):
  """What a stage costs for each pixel of the image, and how much of it is trained."""

  flops_per_pixel: float
  num_parameters: int


class StageTime(NamedTuple):
  """Seconds of one call: the median, the fastest and the slowest; and the device that ran it."""

  median_seconds: float
  min_seconds: float
  max_seconds: float
  device: str


def flops_per_pixel(transform: Layer, scale: int = 1, elementwise: bool = False) -> float:
  """FLOPs for each pixel of the image.

  Args:
    transform: the layers.
    scale: the image's size over the size of the input of `transform` (see `Stage`).
    elementwise: also count biases and the divisions of GDN (see the top of this file).
  """
  height, width = _HEIGHT // scale, _WIDTH // scale
  flops = transform.flops(height, width)
  if elementwise:
    flops += transform.elementwise(height, width)
  return flops / (height * width * scale**2)


def profile_stages(stages: Mapping[str, Stage], elementwise: bool = False) -> dict[str, StageCost]:
  """The cost of each named stage, in the order given."""
  return {
    name: StageCost(
      flops_per_pixel(stage.transform, stage.scale, elementwise), stage.transform.num_parameters()
    )
    for name, stage in stages.items()
  }


def time_stage(fn: Callable[..., Any], *args: Any, repeats: int = 10, warmup: int = 2) -> StageTime:
  """Times fn(*args) after `warmup` calls that do not count (they trace, and fill the caches).

  The result's tensors are waited for, also on a GPU.
  """
  seconds = []
  for i in range(warmup + repeats):
    start = time.perf_counter()
    _wait_for(fn(*args))
    if i >= warmup:
      seconds.append(time.perf_counter() - start)
  return StageTime(statistics.median(seconds), min(seconds), max(seconds), device_name())


def device_name() -> str:
  """The first GPU that TensorFlow sees, or else the processor."""
  for gpu in tf.config.list_physical_devices("GPU"):
    return tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
  cpuinfo = Path("/proc/cpuinfo")
  if cpuinfo.exists():
    models = [
      line.partition(":")[2].strip()
      for line in cpuinfo.read_text().splitlines()
      if line.startswith("model name")
    ]
    if models:
      return f"{models[0]}, {len(models)} CPUs"
  return platform.processor() or platform.machine()


def _wait_for(result: Any) -> None:
  """Returns once the tensors in `result` are computed."""
  for tensor in tf.nest.flatten(result):
    if isinstance(tensor, tf.Tensor):
      # One value is enough to wait for all of it, and cheap to copy from a GPU.
      tf.reshape(tensor, [-1])[:1].numpy()
