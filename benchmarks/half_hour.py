"""The half hour of `sweeps/half_hour.py` beside classical codecs and CompressAI's trainer.

  ./launch.py --sweep sweeps/half_hour.py --xid half_hour --executor local
  ./launch_eval.py --workdirs 'train_xms/half_hour/wid=*' --dataset kodak --executor local
  python -m common.classical --dataset kodak --codec jpeg-optimized,webp,jpeg2000 --qualities ...
  PEER/python benchmarks/compressai_trainer.py ... --out PEER_OUT       (its --help has the rest)
  python -m benchmarks.half_hour --dataset kodak --peer_out PEER_OUT

What CompressAI's trainer left is measured like everything else and goes to the data set's results,
so that `python -m common.report` draws it too. Then a table: PSNR at equal rates, between measured
points by straight lines over the logarithm of the rate; and where our curve is above each other.
"""

import argparse
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Optional

import numpy as np

import configs
from common import bd, data, metrics, results, runs

FAMILY = "compressai"
_RATES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # bpp.


def import_peer(out: pathlib.Path, images: data.EvalImages, xid: str) -> list[results.ResultFile]:
  """One result for each rate that CompressAI's trainer left in `out`.

  Raises:
    SystemExit: There are none, or they are of other pictures.
  """
  folders = sorted(path.parent for path in out.glob("*/facts.json"))
  if not folders:
    raise SystemExit(f"No */facts.json in {str(out)!r}: benchmarks/compressai_trainer.py --out.")
  return [_import_rate(folder, images, xid, wid) for wid, folder in enumerate(folders)]


def _import_rate(
  folder: pathlib.Path, images: data.EvalImages, xid: str, wid: int
) -> results.ResultFile:
  facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
  files = {record["image"]: record for record in facts["images"]}
  records = []
  for index in range(len(images)):
    name, original = images[index]
    picture = folder / f"{pathlib.PurePath(name).stem}.png"
    if name not in files or not picture.is_file():
      raise SystemExit(f"{name} of {images.name} is not in {str(folder)!r}: made from others.")
    pixels = original.shape[0] * original.shape[1]
    records.append(
      results.EvalRecord(
        image=name,
        num_pixels=pixels,
        num_bytes=files[name]["bytes"],
        bpp=8 * files[name]["bytes"] / pixels,
        bpp_estimated=None,
        seconds_encode=files[name]["seconds_encode"],
        seconds_decode=files[name]["seconds_decode"],
        **metrics.measure(original, data.read_image(picture)),
      )
    )
  settings = facts["settings"]
  label = (
    f"CompressAI {facts['compressai']} {settings['model']}, trained as its example "
    f"({settings['batch_size']} crops a step, rate {settings['learning_rate']:g})"
  )
  return results.ResultFile(
    run={
      "family": FAMILY,
      "xid": xid,
      "wid": wid,
      "runname": f"lambda={facts['lambda']:g}",
      **runs.git_state(configs.PROJECT_DIR),
      "workdir": None,
      "device": runs.processor(),
      "label": label,
      "num_parameters": facts["parameters"],
      "training": {"minutes": facts["minutes"], "machine": runs.processor()},
    },
    config={k: v for k, v in facts.items() if k != "images"},
    overrides={},
    step=facts["steps"],
    dataset={"name": images.name, "images": [r.image for r in records], "hash": images.hash},
    mode="bitstream",
    records=tuple(records),
  )


def psnr_at(curve: results.RDCurve, rate: float) -> Optional[float]:
  """PSNR in dB at a rate in bpp; None outside of what was measured."""
  points = bd.front(curve)
  if not points or not points[0][0] <= rate <= points[-1][0]:
    return None
  rates, psnrs = zip(*points)
  return float(np.interp(math.log(rate), np.log(rates), psnrs))


def table(ours: results.RDCurve, others: Sequence[results.RDCurve]) -> list[str]:
  """Markdown: PSNR at equal rates; then where ours is above."""

  def cell(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.2f}"

  curves = [ours, *others]
  lines = [
    f"| PSNR in dB at bpp | {' | '.join(f'{rate:g}' for rate in _RATES)} |",
    "|---|" + "---|" * len(_RATES),
    *(f"| {c.label} | {' | '.join(cell(psnr_at(c, r)) for r in _RATES)} |" for c in curves),
    "",
    "| curve | points: bpp / dB |",
    "|---|---|",
  ]
  for curve in curves:
    points = ", ".join(f"{b:.3f} / {q:.2f}" for b, q in zip(curve.bpp, curve.psnr_db))
    lines.append(f"| {curve.label} | {points} |")
  lines.append("")
  for other in others:
    delta = bd.bd_rate(other, ours)
    rate = "" if delta.value is None else f" BD-rate {bd.signed(delta.value, 1)}%."
    lines.append(f"- Against {other.label}: {bd.gain_sentence(bd.gain(other, ours))}{rate}")
  return lines


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--dataset", default="kodak")
  parser.add_argument("--xid", default="half_hour", help="our experiment")
  parser.add_argument("--results_dir", type=pathlib.Path, default=configs.RESULTS_DIR)
  parser.add_argument("--peer_out", type=pathlib.Path, help="of benchmarks/compressai_trainer.py")
  parser.add_argument("--peer_xid", default="half_hour", help="the name of the peer's results")
  args = parser.parse_args()
  if args.peer_out is not None:
    for result in import_peer(args.peer_out, data.load_eval_images(args.dataset), args.peer_xid):
      print(f"Wrote {results.write(args.results_dir, result)}")
  files = [results.read(path) for path in results.find(args.results_dir, args.dataset)]
  ours = results.curves(f for f in files if _is_ours(f, args.xid))
  if len(ours) != 1:
    raise SystemExit(f"{len(ours)} curves of {args.xid!r} in {args.results_dir}: launch_eval.py.")
  others = results.curves(f for f in files if not _is_ours(f, args.xid))
  print("\n".join(table(ours[0], others)))


def _is_ours(result: results.ResultFile, xid: str) -> bool:
  return bool(result.run["xid"] == xid and result.run["family"] != FAMILY)


if __name__ == "__main__":
  main()
