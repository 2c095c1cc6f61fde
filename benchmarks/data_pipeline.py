"""Crops per second that the training pipeline delivers: `python -m benchmarks.data_pipeline`.

Pictures are generated into a temporary folder: PNG and JPEG files of 512x512 pixels, and JPEG
files of 2048x1536. "TF" is the `tf.data` pipeline as in training, "NumPy" the same crops without
it, on one thread. Goal: 5,000 cached crops of 256x256 a second, so that the data never hold up a
training step. The files are read once before, so they come from the operating system's cache.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from typing import Callable

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from common import data, dead_leaves

BATCHSIZE = 16


def write_pictures(folder: pathlib.Path, count: int) -> None:
  generator = dead_leaves.Generator()
  for kind in ("png", "jpg", "large-jpg"):
    (folder / kind).mkdir()
  for i in range(count):
    image = Image.fromarray(generator.picture(i))
    image.save(folder / "png" / f"{i}.png")
    image.save(folder / "jpg" / f"{i}.jpg", quality=90)
    large = image.resize((2048, 1536), Image.Resampling.BICUBIC)
    large.save(folder / "large-jpg" / f"{i}.jpg", quality=90)


def rate(batch: Callable[[int], np.ndarray], seconds: float, warmup: int) -> float:
  """Crops a second of `batch(0), batch(1), ...`, after `warmup` of them."""
  for step in range(warmup):
    batch(step)
  start, step = time.perf_counter(), warmup
  while time.perf_counter() - start < seconds:
    batch(step)
    step += 1
  return (step - warmup) * BATCHSIZE / (time.perf_counter() - start)


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--pictures", type=int, default=32)
  parser.add_argument("--patchsize", type=int, default=256)
  parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_pictures(folder, options.pictures)
    print(f"{options.patchsize}x{options.patchsize}, batches of {BATCHSIZE}, in crops/s")
    print(f"{'files':<12}{'cached':<8}{'patches':>8}{'TF':>10}{'NumPy':>10}{'open ms':>10}")
    for kind, cache_mb, patches in (
      ("png", 2048, 1), ("png", 0, 1), ("png", 0, 8),
      ("jpg", 2048, 1), ("jpg", 0, 1), ("jpg", 0, 8), ("large-jpg", 0, 1),
    ):  # fmt: skip
      config = dict(
        dataset=str(folder / kind),
        batchsize=BATCHSIZE,
        patchsize=options.patchsize,
        patches_per_image=patches,
        cache_mb=cache_mb,
      )
      start = time.perf_counter()
      sampler = data.CropSampler(config, seed=0)
      opened = time.perf_counter() - start
      warmup = 2 + options.pictures * patches // BATCHSIZE
      plain = rate(sampler.batch, options.seconds, warmup)
      batches = iter(data.to_tf_dataset(sampler))
      piped = rate(lambda step, it=batches: next(it), options.seconds, warmup)
      del batches
      cached = "yes" if cache_mb else "no"
      print(f"{kind:<12}{cached:<8}{patches:>8}{piped:>10.0f}{plain:>10.0f}{1e3 * opened:>10.1f}")


if __name__ == "__main__":
  main()
