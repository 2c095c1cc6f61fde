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

`profile_codec` measures a whole codec: its stages, and the walk between bytes and pixels through
the contract of `common.codec`. `table` prints what it returns.
"""

import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

import numpy as np
import tensorflow as tf

from common.layers import Layer

if TYPE_CHECKING:
  from common.codec import TrainableCodec

# Any multiple of all downsampling factors gives the same count per pixel.
_HEIGHT, _WIDTH = 512, 768

# Side of the matrices whose product is the ceiling. With 2048, fresh memory for the result (the
# layers before use it up) costs a quarter of the rate on 2 cores.
MATRIX_SIZE = 3072

# A quiet machine's fastest matrix product is not faster than its slowest by more than this.
_BUSY = 1.25

# The walk between pixels and bytes, in order.
ENCODE_STEPS = ("infer", "pack")
DECODE_STEPS = ("unpack", "synthesize", "to_image")


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


def time_in_turn(
  calls: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
  """Seconds of each named call, `repeats` numbers each: number k of all was measured in round k.

  The calls take turns, so that a machine that is busy with something else slows all of them down
  alike. The first `warmup` rounds do not count (they trace). The tensors that a call returns are
  waited for, also on a GPU.
  """
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for i in range(warmup + repeats):
    for name, call in calls.items():
      start = time.perf_counter()
      _wait_for(call())
      if i >= warmup:
        seconds[name].append(time.perf_counter() - start)
  return seconds


def make_matmul(size: int = MATRIX_SIZE) -> tuple[Callable[[], tf.Tensor], float]:
  """A product of two size x size float32 matrices, the ceiling of these layers, and its FLOPs."""
  a, b = tf.random.normal([size, size]), tf.random.normal([size, size])

  @tf.function
  def product() -> tf.Tensor:
    return tf.matmul(a, b)[:1, :1]

  return product, 2.0 * size**3


def profile_codec(
  codec: "TrainableCodec", image: np.ndarray, repeats: int = 5, matrix_size: int = MATRIX_SIZE
) -> dict[str, Any]:
  """What `codec` costs for one picture, as a dict that JSON can hold.

  The stages run compiled, as in the codec (`TrainableCodec.graph`), in float32 on inputs of the
  padded picture's size; their inputs are random numbers, on which no layer's time depends.

  Args:
    codec: With coding tables (`prepare`).
    image: uint8 [H,W,3].
    repeats: How often each part is timed; the medians count.
    matrix_size: See `make_matmul`.

  Returns:
    What `common.results.ResultFile.profile` describes.
  """
  from common import rd  # Lazy: rd imports codec, which imports this module.

  matmul, matmul_flops = make_matmul(matrix_size)
  calls: dict[str, Callable[[], Any]] = {"matmul": matmul}
  stages = codec.stages()
  height, width = (rd.padded_size(side, codec.downsample_factor) for side in image.shape[:2])
  flops = {}
  for name, stage in stages.items():
    inputs = (-(-height // stage.scale), -(-width // stage.scale))
    calls[f"stage {name}"] = _compiled(stage.transform, inputs)
    flops[name] = stage.transform.flops(*inputs)
  latents = rd.infer(codec, rd.to_batch(image))
  size = (image.shape[0], image.shape[1])
  data = codec.pack(latents, size)
  decode, _ = codec.unpack(data)
  x_hat = rd.synthesize(codec, decode, size)
  calls.update(
    infer=lambda: rd.infer(codec, rd.to_batch(image)),
    pack=lambda: codec.pack(latents, size),
    unpack=lambda: codec.unpack(data),
    synthesize=lambda: rd.synthesize(codec, decode, size),
    to_image=lambda: rd.to_image(x_hat),
  )
  seconds = time_in_turn(calls, repeats)
  for total, steps in (("compress", ENCODE_STEPS), ("decompress", DECODE_STEPS)):
    seconds[total] = [sum(parts) for parts in zip(*(seconds[step] for step in steps))]
  median = {name: statistics.median(values) for name, values in seconds.items()}
  all_stages = sum(median[f"stage {name}"] for name in stages)
  products, everything = profile_stages(stages), profile_stages(stages, elementwise=True)
  rates = [matmul_flops / s / 1e9 for s in seconds["matmul"]]
  return {
    "size": list(size),
    "num_bytes": len(data),
    "device": device_name(),
    "repeats": repeats,
    "matmul_gflops": statistics.median(rates),
    "matmul_gflops_range": [min(rates), max(rates)],
    "stages": {
      name: {
        "flops_per_pixel": everything[name].flops_per_pixel,
        "flops_per_pixel_products": products[name].flops_per_pixel,
        "num_parameters": products[name].num_parameters,
        "seconds": median[f"stage {name}"],
        "share": median[f"stage {name}"] / all_stages,
        "gflops": flops[name] / median[f"stage {name}"] / 1e9,
      }
      for name in stages
    },
    "seconds": {
      name: median[name] for name in (*ENCODE_STEPS, "compress", *DECODE_STEPS, "decompress")
    },
    # By the contract's names, "g..." are what the decoder runs: synthesis, hyper-synthesis.
    "decoder_flops_per_pixel": sum(
      cost.flops_per_pixel for name, cost in everything.items() if name.startswith("g")
    ),
  }


def table(profile: Mapping[str, Any]) -> str:
  """The text of a profile, for people; see `profile_codec`."""
  height, width = profile["size"]
  low, high = profile["matmul_gflops_range"]
  lines = [
    f"{height}x{width} (HxW), float32, median of {profile['repeats']}; {profile['device']}",
    f"matrix product in the same run: {profile['matmul_gflops']:.1f} GFLOP/s "
    f"({low:.1f} to {high:.1f})"
    + ("; it varied, the machine was busy: seconds are rough" if high > _BUSY * low else ""),
    "",
    f"{'stage':8s}{'FLOPs/pixel':>13s}{'products':>13s}{'parameters':>13s}{'seconds':>10s}"
    f"{'share':>8s}{'GFLOP/s':>10s}{'of matmul':>11s}",
  ]
  for name, stage in profile["stages"].items():
    lines.append(
      f"{name:8s}{stage['flops_per_pixel']:13,.0f}{stage['flops_per_pixel_products']:13,.0f}"
      f"{stage['num_parameters']:13,d}{stage['seconds']:10.4f}{stage['share']:8.1%}"
      f"{stage['gflops']:10.1f}{stage['gflops'] / profile['matmul_gflops']:11.1%}"
    )
  lines += [
    "",
    "FLOPs/pixel compares with published tables: 2 a multiply-add, 1 an addition of a bias or of",
    "GDN's beta, 1 a product or division of GDN. products and GFLOP/s: the multiply-adds alone.",
    "Stages run in float32, as in training; what files are coded with (an integer g_h) is in pack",
    "and unpack.",
    "",
    f"{'walk':12s}{'seconds':>9s}{'share':>8s}",
  ]
  for total, steps in (("compress", ENCODE_STEPS), ("decompress", DECODE_STEPS)):
    for name in (*steps, total):
      seconds = profile["seconds"][name]
      share = seconds / profile["seconds"][total]
      label = name if name == total else f"  {name}"
      lines.append(f"{label:12s}{seconds:9.4f}{share:8.1%}")
  bpp = 8 * profile["num_bytes"] / (height * width)
  lines.append(f"{profile['num_bytes']} bytes, {bpp:.3f} bits per pixel")
  return "\n".join(lines)


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


def _compiled(transform: Layer, size: tuple[int, int]) -> Callable[[], tf.Tensor]:
  """One call of a transform on an input of `size`, traced as `TrainableCodec.graph` does."""
  channels = transform.in_channels
  spec = tf.TensorSpec([None, None, None, channels], tf.float32)
  function = tf.function(lambda x: transform(x)).get_concrete_function(spec)
  x = tf.random.stateless_normal([1, *size, channels], seed=[0, 0])
  return lambda: function(x)


def _wait_for(result: Any) -> None:
  """Returns once the tensors in `result` are computed."""
  for tensor in tf.nest.flatten(result):
    if isinstance(tensor, tf.Tensor):
      # One value is enough to wait for all of it, and cheap to copy from a GPU.
      tf.reshape(tensor, [-1])[:1].numpy()
