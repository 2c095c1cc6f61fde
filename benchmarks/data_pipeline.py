"""Crops per second that the training pipeline delivers: `python -m benchmarks.data_pipeline`.

Pictures are generated into a temporary folder: PNG and JPEG files of 512x512 pixels, and JPEG
files of 2048x1536. "TF" is the `tf.data` pipeline as in training, "NumPy" the same crops without
it, on one thread. The files are read once before, so they come from the operating system's cache.

Goals: 5,000 cached crops of 256x256 a second, and five times as many crops from any source as the
training step takes, so that the data never hold it up. The step is that of bls2017, the full config
with the fewest FLOPs, and is timed in the same run. The ceiling of a crop is a copy in memory.
"""

import pathlib
import statistics
import sys
import tempfile
import time
from typing import Callable

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import ceilings, rows, train_step
from common import data, dead_leaves, hyper

BATCHSIZE = 16
_STEP_CONFIG = "factorized/configs/bls2017.py"
_CACHED_RATE = 5000.0  # Crops of 256x256 a second.
_TIMES_THE_STEP = 5.0


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


def step_rate(rounds: int) -> list[float]:
  """Crops a second that the training step takes, on crops that are there already."""
  config = hyper.load(_STEP_CONFIG).get_config()
  batch, patch = config.train_data_config.batchsize, config.train_data_config.patchsize
  crops = np.random.default_rng(0).integers(0, 256, [batch, patch, patch, 3], np.uint8)
  step, _ = train_step.make_step("factorized", config, crops)
  step()
  rates = []
  for _ in range(rounds):
    start = time.perf_counter()
    step()
    rates.append(batch / (time.perf_counter() - start))
  return rates


def main() -> None:
  parser = rows.parser(__doc__)
  parser.add_argument("--pictures", type=int, default=32)
  parser.add_argument("--patchsize", type=int, default=256)
  parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
  options = parser.parse_args()
  measured: list[tuple[str, list[float], bool]] = []
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
      # Three figures of a third of the time each: their spread says how steady the machine was.
      piped = [
        rate(lambda step, it=batches: next(it), options.seconds / 3, 0 if i else warmup)
        for i in range(3)
      ]
      del batches
      cached = "yes" if cache_mb else "no"
      middle = statistics.median(piped)
      print(f"{kind:<12}{cached:<8}{patches:>8}{middle:>10.0f}{plain:>10.0f}{1e3 * opened:>10.1f}")
      if patches == 1:
        label = f"{kind} of 512x512" if kind != "large-jpg" else "jpg of 2048x1536"
        measured.append((f"{label}, {'cached' if cache_mb else 'decoded'}", piped, bool(cache_mb)))
  steps = step_rate(5)
  of_step = statistics.median(steps)
  print(f"the training step of {_STEP_CONFIG} takes {rows.spread(steps, 1)} crops/s")
  found = ceilings.measure()
  crop_bytes = 2 * 3 * options.patchsize**2  # Read and written.
  copies = statistics.median(found[rows.COPY]) * 1e9 / crop_bytes
  print(f"a copy of each crop in memory, at the rate of large copies: {copies:,.0f} crops/s")
  figures = []
  for label, values, is_cached in measured:
    middle = statistics.median(values)
    if is_cached:
      against = f"{_CACHED_RATE:,.0f}; a copy of each {copies:,.0f}"
      share = middle / _CACHED_RATE
      figures.append(rows.Figure(7, label, values, "crops/s", against, share, 1.0))
    times = middle / of_step
    against = f"step of bls2017 {of_step:.1f} crops/s"
    figures.append(rows.Figure(7, label, values, "crops/s", against, times, _TIMES_THE_STEP))
  rows.report(figures, found, options.json)


if __name__ == "__main__":
  main()
