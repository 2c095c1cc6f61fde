"""Decoding one picture, bytes to pixels: the full-size two_layer_syn beside the full-size mbt2018.

  python -m benchmarks.decode [--dataset kodak] [--rounds 15]

Each model decodes its own file of the data set's first picture, with the exact (integer) and with
the float hyper-synthesis; the four take turns with a large matrix product (the ceiling). Weights
start from a DCT at the config's lambda, so that the files are of a plausible size; they are not
trained, which changes the bytes and hardly the time.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from typing import TYPE_CHECKING

from benchmarks import ceilings
from common import data, hyper

if TYPE_CHECKING:
  import tensorflow as tf

  from common.codec import TrainableCodec

CONFIGS = ("mshyper/configs/two_layer_syn.py", "mshyper/configs/mbt2018.py")


def make_codec(path: str, exact: bool, x: tf.Tensor) -> TrainableCodec:
  """The config's codec, from a DCT and with its densities fitted to `x` [1, H, W, 3]."""
  import tensorflow as tf

  from common import rd

  config = hyper.load(path).get_config()
  config.model_config.init = "dct"
  config.model_config.exact_coding = exact
  tf.keras.utils.set_random_seed(0)
  codec = importlib.import_module("mshyper.codec").build(config.model_config)
  codec.calibrate(rd.pad(x, codec.downsample_factor))
  codec.prepare()
  return codec


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--dataset", default="sample", help="its first picture is decoded")
  parser.add_argument("--rounds", type=int, default=15, help="how often each is timed")
  args = parser.parse_args()
  from common import profiling, rd

  name, image = data.load_eval_images(args.dataset)[0]
  x = rd.to_batch(image)
  codecs, files = {}, {}
  for path in CONFIGS:
    for exact in (True, False):
      label = f"{path.split('/')[-1][:-3]} {'exact' if exact else 'float'}"
      codecs[label] = make_codec(path, exact, x)
      files[label] = codecs[label].compress(image)
  matmul = ceilings.make_matmul_probe()
  rates: list[float] = []
  seconds: dict[str, list[tuple[float, float, float]]] = {label: [] for label in codecs}
  for turn in range(args.rounds + 2):
    rates.append(matmul())
    for label, codec in codecs.items():
      times = [time.perf_counter()]
      decode, size = codec.unpack(files[label])
      times.append(time.perf_counter())
      decoded = rd.synthesize(codec, decode, size)
      pixels = rd.to_image(decoded)
      times.append(time.perf_counter())
      if pixels.shape != image.shape:
        raise AssertionError(f"{label} decodes {pixels.shape}, not {image.shape}.")
      if turn >= 2:  # The first calls trace, and fill the allocator's pools.
        seconds[label].append((times[1] - times[0], times[2] - times[1], times[2] - times[0]))
  print(f"{name} {image.shape[0]}x{image.shape[1]} (HxW), {profiling.device_name()}")
  print(
    f"float32 matrix product {statistics.median(rates):.0f} GFLOP/s "
    f"({min(rates):.0f} to {max(rates):.0f})"
  )
  print(
    f"{'':22s}{'FLOPs/pixel':>12s}{'bytes':>9s}{'unpack s':>10s}{'to pixels':>11s}{'total s':>9s}"
    f"{'min':>8s}{'max':>8s}"
  )
  for label, codec in codecs.items():
    costs = profiling.profile_stages(codec.stages(), elementwise=True)
    flops = costs["g"].flops_per_pixel + costs["g_h"].flops_per_pixel
    unpack, synthesize, total = zip(*seconds[label])
    print(
      f"{label:22s}{flops:12,.0f}{len(files[label]):9,d}{statistics.median(unpack):10.3f}"
      f"{statistics.median(synthesize):11.3f}{statistics.median(total):9.3f}"
      f"{min(total):8.3f}{max(total):8.3f}"
    )


if __name__ == "__main__":
  main()
