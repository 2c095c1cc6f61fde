"""BD-rates by PSNR of JPEG encoders against Pillow's JPEG 4:4:4, on real files.

  python -m benchmarks.jpeg_bd --dataset kodak [--rows own420,itinf420] [--jobs 2] [--every 3]

Each picture's bytes and PSNR at every setting are kept in --cache (JSON, by the picture's and the
settings' hashes), so a second run measures only what is new; after a change to the search, say
--fresh. Curves are means over the pictures, of the bpp and of each picture's PSNR.

Seconds are medians over pictures and settings, of the encoder alone, and comparable within one run
on a quiet machine with --jobs 1 only.
"""

import argparse
import concurrent.futures
import hashlib
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import numpy as np
import tqdm

import configs
from common import bd, classical, data, libjpeg, metrics, results, runs
from ljpeg import jpeg_file, rdo, tables

LEVELS = (4.0, 6.0, 9.0, 13.0, 19.0, 28.0, 42.0, 62.0, 92.0)
FEW_LEVELS = (5.0, 10.0, 20.0, 40.0, 80.0)


def own(subsampling: str, effort: rdo.Effort) -> Callable[[np.ndarray, float], bytes]:
  def encode(image: np.ndarray, level: float) -> bytes:
    point = tables.tuned(level, subsampling)
    source = rdo.source(image, subsampling)
    return rdo.optimise(source, point.tables, point.lambda_, effort).file()

  return encode


def own_flat(subsampling: str) -> Callable[[np.ndarray, float], bytes]:
  def encode(image: np.ndarray, level: float) -> bytes:
    point = tables.flat(level)
    source = rdo.source(image, subsampling)
    return rdo.optimise(source, point.tables, point.lambda_).file()

  return encode


def itinf(subsampling: str) -> Callable[[np.ndarray, float], bytes]:
  def encode(image: np.ndarray, level: float) -> bytes:
    point = tables.tuned(level, subsampling)
    source = rdo.source(image, subsampling)
    steps = (0.1,)
    return rdo.optimise_with_tables(source, point.tables, point.lambda_, steps).file()

  return encode


def trellis(
  subsampling: str, flat: bool, baseline: bool = True
) -> Callable[[np.ndarray, float], bytes]:
  """mozjpeg's coefficients for our tables, in our baseline files."""

  def encode(image: np.ndarray, level: float) -> bytes:
    point = tables.flat(level) if flat else tables.tuned(level, subsampling)
    file = libjpeg.mozjpeg(image, tables=point.tables, subsampling=subsampling)
    return jpeg_file.write_jpeg(*jpeg_file.read_jpeg(file)) if baseline else file

  return encode


def known(name: str) -> Callable[[np.ndarray, float], bytes]:
  return lambda image, quality: classical.make(name, int(quality)).compress(image)


# Name -> (label, encoder, its settings).
ROWS = {
  "jpeg444": ("Pillow 4:4:4, baseline (anchor)", known("jpeg444"), classical.QUALITIES),
  "jpeg444-optimized": (
    "Pillow 4:4:4 optimised, baseline", known("jpeg444-optimized"), classical.QUALITIES,
  ),
  "jpeg-optimized": (
    "Pillow 4:2:0 optimised, baseline", known("jpeg-optimized"), classical.QUALITIES,
  ),
  "jpegli": ("jpegli 4:2:0, baseline", known("jpegli"), classical.QUALITIES),
  "mozjpeg": ("mozjpeg 4:2:0, progressive", known("mozjpeg"), classical.QUALITIES),
  "mozjpeg444": ("mozjpeg 4:4:4, progressive", known("mozjpeg444"), classical.QUALITIES),
  "mozjpeg-flat": (
    "mozjpeg 4:2:0 flat table, progressive", trellis("4:2:0", True, False), LEVELS,
  ),
  "mozjpeg444-flat": (
    "mozjpeg 4:4:4 flat table, progressive", trellis("4:4:4", True, False), LEVELS,
  ),
  "mozjpeg-flat-baseline": (
    "mozjpeg 4:2:0 flat table, rewritten as baseline", trellis("4:2:0", True), LEVELS,
  ),
  "mozjpeg444-flat-baseline": (
    "mozjpeg 4:4:4 flat table, rewritten as baseline", trellis("4:4:4", True), LEVELS,
  ),
  "trellis420": ("ours: tuned tables, mozjpeg's trellis, 4:2:0", trellis("4:2:0", False), LEVELS),
  "trellis444": ("ours: tuned tables, mozjpeg's trellis, 4:4:4", trellis("4:4:4", False), LEVELS),
  "flat444": ("ours: flat table, own search, 4:4:4", own_flat("4:4:4"), LEVELS),
  "flat420": ("ours: flat table, own search, 4:2:0", own_flat("4:2:0"), LEVELS),
  "fast444": ("ours: tuned tables, own search (fast), 4:4:4", own("4:4:4", rdo.FAST), LEVELS),
  "fast420": ("ours: tuned tables, own search (fast), 4:2:0", own("4:2:0", rdo.FAST), LEVELS),
  "own444": ("ours: tuned tables, own search, 4:4:4", own("4:4:4", rdo.DEFAULT), LEVELS),
  "own420": ("ours: tuned tables, own search, 4:2:0", own("4:2:0", rdo.DEFAULT), LEVELS),
  "best444": ("ours: tuned tables, own search (best), 4:4:4", own("4:4:4", rdo.BEST), LEVELS),
  "best420": ("ours: tuned tables, own search (best), 4:2:0", own("4:2:0", rdo.BEST), LEVELS),
  "few420": ("ours: own search (best), 4:2:0, few levels", own("4:2:0", rdo.BEST), FEW_LEVELS),
  "itinf444": ("ours: itinf (tables of each picture), 4:4:4", itinf("4:4:4"), FEW_LEVELS),
  "itinf420": ("ours: itinf (tables of each picture), 4:2:0", itinf("4:2:0"), FEW_LEVELS),
}  # fmt: skip


def measure(row: str, cache: pathlib.Path, dataset: str, index: int, fresh: bool) -> list[dict]:
  """A row's points on one picture: bpp, psnr, seconds."""
  _, encode, settings = ROWS[row]
  _, image = data.load_eval_images(dataset)[index]
  key = hashlib.sha256(repr((row, settings, image.shape)).encode() + image.tobytes()).hexdigest()
  path = cache / f"{row}-{key[:24]}.json"
  if path.is_file() and not fresh:
    return json.loads(path.read_text())
  decoder = classical.make("jpeg444", 50)
  points = []
  for setting in settings:
    start = time.perf_counter()
    file = encode(image, setting)
    seconds = time.perf_counter() - start
    decoded = decoder.decompress(file)
    points.append(
      {
        "bpp": 8 * len(file) / (image.shape[0] * image.shape[1]),
        "psnr_db": metrics.psnr_db(image, decoded),
        "seconds": seconds,
      }
    )
  runs.write_json(path, points)
  return points


def curve(label: str, pictures: list[list[dict]]) -> results.RDCurve:
  points = sorted(
    (statistics.mean(p["bpp"] for p in at), statistics.mean(p["psnr_db"] for p in at))
    for at in zip(*pictures)
  )
  return results.RDCurve(
    label, tuple(p[0] for p in points), tuple(p[1] for p in points), "bitstream"
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--dataset", default="kodak")
  parser.add_argument("--rows", help=f"of {', '.join(ROWS)}; default all")
  parser.add_argument("--jobs", type=int, default=1)
  parser.add_argument("--every", type=int, default=1, help="only each n-th picture")
  parser.add_argument("--cache", default=str(configs.DATA_CACHE_DIR / "jpeg_bd"))
  parser.add_argument("--fresh", action="store_true", help="measure these rows anew")
  args = parser.parse_args()
  cache = pathlib.Path(args.cache)
  cache.mkdir(parents=True, exist_ok=True)
  rows = args.rows.split(",") if args.rows else list(ROWS)
  unknown = set(rows) - set(ROWS)
  if unknown:
    parser.error(f"unknown rows {', '.join(sorted(unknown))}")
  indexes = range(0, len(data.load_eval_images(args.dataset)), args.every)
  curves, seconds = {}, {}
  with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
    for row in dict.fromkeys(["jpeg444", *rows]):
      fresh = args.fresh and row in rows
      tasks = [pool.submit(measure, row, cache, args.dataset, i, fresh) for i in indexes]
      pictures = [task.result() for task in tqdm.tqdm(tasks, desc=row, disable=None)]
      curves[row] = curve(ROWS[row][0], pictures)
      seconds[row] = statistics.median(p["seconds"] for points in pictures for p in points)
      delta = bd.bd_rate(curves["jpeg444"], curves[row])
      low, high = delta.overlap or (0, 0)
      print(
        f"{ROWS[row][0]:52s} {bd.signed(delta.value or 0, 2):>7s}%  over {low:.1f} to {high:.1f} dB"
        f"  {1000 * seconds[row]:7.0f} ms  {delta.remark}",
        flush=True,
      )


if __name__ == "__main__":
  main()
