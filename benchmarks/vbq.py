"""VBQ of one picture: the search at all lambdas, and a file of one setting, encoded and decoded.

  python -m benchmarks.vbq [--channels 256] [--rounds 9]
  python -m benchmarks.vbq --workdir RUN --dataset kodak     (a trained run with its quantizer)

Without a run: the full-size untrained model, started from a DCT, on a picture of 768x512. A large
matrix product is timed in turn: a busy machine shows in its range. Memory is the most that the
search has allocated at once.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import ceilings, rows
from common import data, hyper, runs

if TYPE_CHECKING:
  from factorized import vae

_SECONDS = 1.0  # What a search by NumPy took, and what is asked.
_GIGABYTES = 1.0


def drawn_codec(channels: int, image: np.ndarray) -> vae.GaussianVAE:
  """An untrained VAE that starts from a DCT, with tables from pictures like `image`."""
  import tensorflow as tf

  from common import rd
  from factorized import vbq
  from factorized.codec import build

  config = hyper.load("factorized/configs/bls2017_vae.py").get_config()
  config.model_config.init = "dct"
  config.model_config.analysis.output_channels = 2 * channels
  config.model_config.synthesis.in_channels = channels
  tf.keras.utils.set_random_seed(0)
  codec = build(config.model_config)
  codec.calibrate(rd.to_batch(image))
  codec.prepare(vbq.build_vbq(vbq.samples_of(codec, [image[::-1], image[:, ::-1]])).arrays())
  return codec


def main() -> None:
  parser = rows.parser(__doc__)
  parser.add_argument("--workdir", help="a trained run; else an untrained model")
  parser.add_argument("--dataset", default="sample", help="its first picture is coded")
  parser.add_argument("--channels", type=int, default=256, help="of the untrained model")
  parser.add_argument("--rounds", type=int, default=9, help="how often each is timed")
  args = parser.parse_args()
  from common import eval_lib, rd
  from factorized import vae, vbq
  from factorized.codec import build

  name, image = data.load_eval_images(args.dataset)[0]
  if args.workdir:
    codec, _ = eval_lib.load_codec(runs.RunDir.open(args.workdir), build)
  else:
    image = np.pad(image, [(0, 512), (0, 768), (0, 0)], "symmetric")[:512, :768]
    codec = drawn_codec(args.channels, image)
  assert isinstance(codec, vae.GaussianVAE)
  latents = rd.infer(codec, rd.to_batch(image))
  mean, deviation = vbq.posterior(latents)
  codec.coder.quantize(mean, deviation, 0)  # The tables of all rates are made once.
  for rate in range(codec.num_rates):
    codec.coder.tables(rate)
  matmul, copy = ceilings.make_matmul_probe(), ceilings.make_copy_probe()
  parts: dict[str, list[float]] = {k: [] for k in ("search", "cpu", "encode", "decode")}
  ceiling: dict[str, list[float]] = {rows.MATMUL: [], rows.COPY: []}
  tracemalloc.start()
  codec.coder.quantize_all(mean, deviation)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  for turn in range(args.rounds + 2):
    ceiling[rows.MATMUL].append(matmul())
    ceiling[rows.COPY].append(copy())
    began, cpu = time.perf_counter(), time.process_time()
    codec.coder.quantize_all(mean, deviation)
    times = [time.perf_counter() - began, time.process_time() - cpu]
    began = time.perf_counter()
    file = codec.compress(image)
    times.append(time.perf_counter() - began)
    began = time.perf_counter()
    decoded = codec.decompress(file)
    times.append(time.perf_counter() - began)
    assert decoded.shape == image.shape
    if turn >= 2:  # The first calls trace, and make tables.
      for key, value in zip(parts, times):
        parts[key].append(value)
  print(
    f"{name} {image.shape[0]}x{image.shape[1]}, {mean.size} latents in {codec.channels} channels"
  )
  labels = {
    "search": f"search, {codec.num_rates} lambdas",
    "cpu": "the same, processor seconds of all threads",
    "encode": f"compress, lambda {codec.coder.settings[codec.rate_index]:g}, {len(file)} bytes",
    "decode": "decompress",
  }
  for key, label in labels.items():
    t = parts[key]
    print(f"{label:48s} {statistics.median(t):.3f} s ({min(t):.3f} to {max(t):.3f})")
  print(f"memory of the search: {peak / 2**20:.0f} MiB")
  search, gigabytes = parts["search"], peak / 1e9
  figures = [
    rows.Figure(
      9, labels["search"], search, "s", f"{_SECONDS} s by NumPy, not run here",
      statistics.median(search) / _SECONDS, 1.0, at_least=False,
    ),
    rows.Figure(
      9, "memory of the search", [gigabytes], "GB", f"{_GIGABYTES} GB", gigabytes / _GIGABYTES, 1.0,
      at_least=False,
    ),
  ]  # fmt: skip
  rows.report(figures, ceiling, args.json)


if __name__ == "__main__":
  main()
