"""VBQ of one picture: the search at all lambdas, and a file of one setting, encoded and decoded.

  python -m benchmarks.vbq [--channels 256] [--rounds 9]
  python -m benchmarks.vbq --workdir RUN --dataset kodak     (a trained run with its quantizer)

Without a run: the full-size untrained model, started from a DCT, on a picture of 768x512. A large
matrix product is timed in turn: a busy machine shows in its range. Memory is the most that the
search has allocated at once.
"""

import argparse
import statistics
import time
import tracemalloc

import numpy as np
import tensorflow as tf

from benchmarks import ceilings
from common import data, eval_lib, hyper, profiling, rd, runs
from factorized import vae, vbq
from factorized.codec import build


def drawn_codec(channels: int, image: np.ndarray) -> vae.GaussianVAE:
  """An untrained VAE that starts from a DCT, with tables from pictures like `image`."""
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
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", help="a trained run; else an untrained model")
  parser.add_argument("--dataset", default="sample", help="its first picture is coded")
  parser.add_argument("--channels", type=int, default=256, help="of the untrained model")
  parser.add_argument("--rounds", type=int, default=9, help="how often each is timed")
  args = parser.parse_args()
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
  matmul = ceilings.make_matmul_probe()
  parts: dict[str, list[float]] = {k: [] for k in ("search", "cpu", "encode", "decode")}
  rates = []
  tracemalloc.start()
  codec.coder.quantize_all(mean, deviation)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  for turn in range(args.rounds + 2):
    rates.append(matmul())
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
  print(f"{profiling.device_name()}, float32 matrix product {statistics.median(rates):.0f} GFLOP/s "
        f"({min(rates):.0f} to {max(rates):.0f})")  # fmt: skip
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


if __name__ == "__main__":
  main()
