"""Runs in CompressAI's own virtual environment, for benchmarks/peer.py: imports nothing of ours.

  python compressai_worker.py IMAGE [--threads N]

Reads words from standard input, a line each, and answers with the seconds that it took: "step" (a
training step of the mean-scale hyperprior, 8 crops of 256x256), "encode" and "decode" (the picture,
to bytes and back), "bytes" (of the file). As CompressAI's own example trainer: Adam for the model
with clipped gradients, and a second Adam for the quantiles. Weights are untrained.
"""

import argparse
import sys
import time

import numpy as np
import torch
from compressai.losses import RateDistortionLoss
from compressai.models import MeanScaleHyperprior
from PIL import Image


class Worker:
  """One model, its optimizers, and one picture."""

  def __init__(self, image: str):
    torch.manual_seed(0)
    self.model = MeanScaleHyperprior(N=192, M=320)
    quantiles = {n for n, _ in self.model.named_parameters() if n.endswith(".quantiles")}
    named = list(self.model.named_parameters())
    self.optimizer = torch.optim.Adam([p for n, p in named if n not in quantiles], lr=1e-4)
    self.aux = torch.optim.Adam([p for n, p in named if n in quantiles], lr=1e-3)
    self.loss = RateDistortionLoss(lmbda=0.01)
    self.crops = torch.rand(8, 3, 256, 256)
    pixels = np.asarray(Image.open(image).convert("RGB"), np.float32) / 255
    self.x = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    self.coded = None

  def step(self) -> None:
    """One step of both optimizers."""
    self.model.train()
    self.optimizer.zero_grad()
    self.aux.zero_grad()
    self.loss(self.model(self.crops), self.crops)["loss"].backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()
    self.model.aux_loss().backward()
    self.aux.step()

  def prepare(self) -> None:
    """Makes the coding tables, and the file."""
    self.model.eval()
    self.model.update(force=True)
    self.encode()

  def encode(self) -> None:
    """Pixels to bytes."""
    with torch.no_grad():
      self.coded = self.model.compress(self.x)

  def decode(self) -> None:
    """Bytes to pixels."""
    with torch.no_grad():
      self.model.decompress(self.coded["strings"], self.coded["shape"])


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("image")
  parser.add_argument("--threads", type=int, default=0)
  args = parser.parse_args()
  if args.threads:
    torch.set_num_threads(args.threads)
  worker = Worker(args.image)
  worker.prepare()  # Before a step moves the weights.
  print(f"ready torch {torch.__version__} threads {torch.get_num_threads()}", flush=True)
  for line in sys.stdin:
    word = line.strip()
    if word == "bytes":
      print(sum(len(s[0]) for s in worker.coded["strings"]), flush=True)
      continue
    began = time.perf_counter()
    if word == "step":
      worker.step()
    else:
      worker.model.eval()
      getattr(worker, word)()
    print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
  main()
