"""Trains a model of CompressAI for some minutes, as its example trainer does, and codes pictures.

Runs in CompressAI's own virtual environment and imports nothing of ours; `benchmarks.half_hour`
reads what it writes.

  PEER/python benchmarks/compressai_trainer.py --train FOLDER --test FOLDER --out FOLDER \\
    --minutes 15.5,4.9,4.9,4.9 --lambdas 0.01,0.03,0.0035,0.0012 [--batch_size 2] [...]

The settings are the defaults of `examples/train.py` in CompressAI's repository: 16 random crops of
256x256 a step, Adam 1e-4 for the model and 1e-3 for the quantiles, gradients clipped at norm 1,
loss of bits per pixel + lambda * MSE on the 0..255 scale. The learning rate there falls where the
test loss stagnates for ten epochs, which minutes do not reach. Options change the settings that
short trainings depend on most. The first lambda begins with random weights, the others with those
that the first ended with. Minutes are the trainer's own: loading the model and data count too.

Then each picture of --test goes to bytes and back, which no minute counts: OUT/<lambda>/ gets the
decoded pictures, and `facts.json` with the settings and each file's bytes and seconds.
"""

import argparse
import copy
import json
import pathlib
import time

import compressai
import numpy as np
import torch
from compressai.models import FactorizedPrior, MeanScaleHyperprior
from PIL import Image

_MODELS = {"bmshj2018-factorized": FactorizedPrior, "mbt2018-mean": MeanScaleHyperprior}


class Crops:
  """Random crops of decoded pictures, each epoch in a new order."""

  def __init__(self, folder: pathlib.Path, batch: int, size: int, seed: int):
    self._pictures = [_read(path) for path in _pictures(folder)]
    self._pictures = [p for p in self._pictures if min(p.shape[:2]) >= size]
    if not self._pictures:
      raise SystemExit(f"No picture of {folder} is {size} pixels wide and high.")
    self._batch, self._size = batch, size
    self._random = np.random.default_rng(seed)
    self._order: list[int] = []

  def next(self) -> torch.Tensor:
    """[batch, 3, size, size] in 0..1."""
    crops = []
    for _ in range(self._batch):
      if not self._order:
        self._order = self._random.permutation(len(self._pictures)).tolist()
      picture = self._pictures[self._order.pop()]
      top, left = (int(self._random.integers(n - self._size + 1)) for n in picture.shape[:2])
      crops.append(picture[top : top + self._size, left : left + self._size])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().div_(255).contiguous()


def train(model, crops: Crops, lmbda: float, until: float, rates: tuple[float, float]) -> int:
  """Steps until the clock says `until`; returns how many."""
  quantiles = [p for n, p in model.named_parameters() if n.endswith(".quantiles")]
  weights = [p for n, p in model.named_parameters() if not n.endswith(".quantiles")]
  optimizer = torch.optim.Adam(weights, lr=rates[0])
  aux_optimizer = torch.optim.Adam(quantiles, lr=rates[1])
  model.train()
  step = 0
  while time.monotonic() < until:
    x = crops.next()
    optimizer.zero_grad()
    aux_optimizer.zero_grad()
    out = model(x)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    bpp = sum(-torch.log2(p).sum() for p in out["likelihoods"].values()) / pixels
    mse = 255**2 * torch.nn.functional.mse_loss(out["x_hat"], x)
    loss = bpp + lmbda * mse
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.aux_loss().backward()
    aux_optimizer.step()
    step += 1
    if step % 20 == 0:
      print(
        f"lambda {lmbda:g} step {step}: loss {loss.item():.4f} bpp {bpp.item():.4f} "
        f"MSE {mse.item():.2f}, {max(0.0, until - time.monotonic()):.0f} s left",
        flush=True,
      )
  return step


def code(model, folder: pathlib.Path, out: pathlib.Path) -> list[dict]:
  """Each picture to bytes and back; `out` gets what comes back."""
  model.eval()
  model.update(force=True)
  records = []
  for path in _pictures(folder):
    picture = _read(path)
    height, width = picture.shape[:2]
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    padding = (0, -width % 64, 0, -height % 64)
    with torch.no_grad():
      began = time.perf_counter()
      coded = model.compress(torch.nn.functional.pad(x, padding, mode="replicate"))
      encoded = time.perf_counter()
      decoded = model.decompress(coded["strings"], coded["shape"])["x_hat"]
      ended = time.perf_counter()
    pixels = decoded[0, :, :height, :width].clamp(0, 1).mul(255).round().permute(1, 2, 0)
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(out / f"{path.stem}.png")
    records.append(
      {
        "image": path.name,
        "bytes": sum(len(string) for strings in coded["strings"] for string in strings),
        "seconds_encode": encoded - began,
        "seconds_decode": ended - encoded,
      }
    )
  return records


def _pictures(folder: pathlib.Path) -> list[pathlib.Path]:
  found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg"})
  if not found:
    raise SystemExit(f"No PNG or JPEG in {folder}.")
  return found


def _read(path: pathlib.Path) -> np.ndarray:
  with Image.open(path) as image:
    return np.asarray(image.convert("RGB"))


def _numbers(text: str) -> list[float]:
  return [float(part) for part in text.split(",")]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--train", type=pathlib.Path, required=True, help="folder of pictures")
  parser.add_argument("--test", type=pathlib.Path, required=True, help="folder of pictures")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the records")
  parser.add_argument("--model", choices=sorted(_MODELS), default="mbt2018-mean")
  parser.add_argument("--channels", type=int, default=128, help="N")
  parser.add_argument("--latents", type=int, default=192, help="M")
  parser.add_argument("--lambdas", type=_numbers, required=True, help="the first is trained first")
  parser.add_argument("--minutes", type=_numbers, required=True, help="one for each lambda")
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--patch_size", type=int, default=256)
  parser.add_argument("--learning_rate", type=float, default=1e-4)
  parser.add_argument("--aux_learning_rate", type=float, default=1e-3)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  if len(args.lambdas) != len(args.minutes):
    parser.error("--lambdas and --minutes need as many numbers as each other.")
  first = None
  for lmbda, minutes in zip(args.lambdas, args.minutes):
    until = time.monotonic() + 60 * minutes
    torch.manual_seed(args.seed)
    model = _MODELS[args.model](args.channels, args.latents)
    if first is not None:
      model.load_state_dict(first)
    crops = Crops(args.train, args.batch_size, args.patch_size, args.seed)
    rates = (args.learning_rate, args.aux_learning_rate)
    steps = train(model, crops, lmbda, until, rates)
    if first is None:
      first = copy.deepcopy(model.state_dict())
    out = args.out / f"{lmbda:g}"
    out.mkdir(parents=True, exist_ok=True)
    records = code(model, args.test, out)
    settings = {k: v for k, v in vars(args).items() if k not in {"train", "test", "out"}}
    facts = {
      "lambda": lmbda,
      "minutes": minutes,
      "steps": steps,
      "parameters": sum(p.numel() for p in model.parameters()),
      "compressai": compressai.__version__,
      "torch": torch.__version__,
      "settings": settings,
      "images": records,
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"lambda {lmbda:g}: {steps} steps; pictures and facts in {out}", flush=True)


if __name__ == "__main__":
  main()
