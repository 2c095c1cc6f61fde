"""This project beside CompressAI on this machine: training step, encoding, decoding.

  benchmarks/setup_peer.sh
  python -m benchmarks.peer [--python .venv-peer/bin/python] [--dataset kodak] [--rounds 7]

The peer is CompressAI's mean-scale hyperprior (N=192, M=320) in a process of its own, which waits
while ours works, and ours while it works; they take turns with a matrix product, so that a busy
machine slows all of them down alike. Ours: the step of mbt2018, the same architecture; encoding
with mbt2018; decoding with two_layer_syn and with mbt2018. Real bytes both times, pixels to bytes
and bytes to pixels; weights untrained (ours from a DCT, so that files are of a plausible size).
"""

import pathlib
import statistics
import subprocess
import tempfile
import time
from typing import Callable

import numpy as np
from PIL import Image

from benchmarks import ceilings, decode, rows, train_step
from common import data, hyper

# The row of what is timed, and how many times as fast as the peer it is to be.
_ASKED = {
  "step, mbt2018": (3, 1.5),
  "decode, two_layer_syn": (4, 6.0),
  "encode, mbt2018": (5, 1.3),
}
_PEER = pathlib.Path(__file__).with_name("compressai_worker.py")


class Peer:
  """The other process."""

  def __init__(self, python: str, image: np.ndarray, folder: str):
    path = pathlib.Path(folder, "image.png")
    Image.fromarray(image).save(path)
    self._process = subprocess.Popen(
      [python, str(_PEER), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    self.version = self._answer()

  def _answer(self) -> str:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise SystemExit("The peer's process ended: see above. benchmarks/setup_peer.sh makes it.")
    return line.strip()

  def __call__(self, word: str) -> float:
    """Asks for a word; returns the number that comes back."""
    assert self._process.stdin is not None
    self._process.stdin.write(word + "\n")
    self._process.stdin.flush()
    return float(self._answer())

  def close(self) -> None:
    """Ends it."""
    assert self._process.stdin is not None
    self._process.stdin.close()
    self._process.wait(30)


def _timed(function: Callable[[], object]) -> Callable[[], float]:
  def run() -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began

  return run


def ours(image: np.ndarray) -> dict[str, Callable[[], float]]:
  """Seconds by name."""
  from common import rd

  x = rd.to_batch(image)
  shallow = decode.make_codec("mshyper/configs/two_layer_syn.py", True, x)
  deep = decode.make_codec("mshyper/configs/mbt2018.py", True, x)
  shallow_file, deep_file = shallow.compress(image), deep.compress(image)
  config = hyper.load("mshyper/configs/mbt2018.py").get_config()
  crops = np.random.default_rng(0).integers(0, 256, [8, 256, 256, 3]).astype(np.uint8)
  step, _ = train_step.make_step("mshyper", config, crops)
  return {
    "step, mbt2018": _timed(step),
    "encode, mbt2018": _timed(lambda: deep.compress(image)),
    "decode, mbt2018": _timed(lambda: deep.decompress(deep_file)),
    "decode, two_layer_syn": _timed(lambda: shallow.decompress(shallow_file)),
  }


def main() -> None:
  parser = rows.parser(__doc__)
  parser.add_argument("--python", default=".venv-peer/bin/python")
  parser.add_argument("--dataset", default="kodak")
  parser.add_argument("--rounds", type=int, default=7)
  args = parser.parse_args()
  _, image = data.load_eval_images(args.dataset)[0]
  runs = ours(image)
  matmul, copy = ceilings.make_matmul_probe(), ceilings.make_copy_probe()
  with tempfile.TemporaryDirectory() as folder:
    peer = Peer(args.python, image, folder)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    theirs: dict[str, list[float]] = {word: [] for word in ("step", "encode", "decode")}
    ceiling: list[float] = []
    bandwidths: list[float] = []
    for round_ in range(args.rounds + 1):
      for name, run in runs.items():
        seconds[name].append(run())
      for word, values in theirs.items():
        values.append(peer(word))
      ceiling.append(matmul())
      bandwidths.append(copy())
      if not round_:  # The first is a warm-up.
        for values in (*seconds.values(), *theirs.values(), ceiling, bandwidths):
          values.clear()
    num_bytes = peer("bytes")
    peer.close()
  print(f"CompressAI mean-scale hyperprior, {peer.version}, {num_bytes:.0f} bytes")
  figures = []
  for name, values in seconds.items():
    other = theirs[name.split(",")[0]]
    ratio = statistics.median(b / a for a, b in zip(values, other))
    print(f"{name:24s} {rows.spread(values)} s, peer {rows.spread(other)} s, ratio {ratio:.2f}")
    if name in _ASKED:
      row, asked = _ASKED[name]
      against = f"CompressAI {rows.spread(other)} s"
      figures.append(rows.Figure(row, name, values, "s", against, ratio, asked))
  rows.report(figures, {rows.MATMUL: ceiling, rows.COPY: bandwidths}, args.json)


if __name__ == "__main__":
  main()
