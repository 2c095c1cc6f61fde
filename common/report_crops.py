"""The same piece of one picture as every curve's codec gives it back, at about one rate.

A classical codec codes the picture anew. A trained run's picture is read from where its evaluation
wrote it (`--save_dir`, see `results.pictures_dir`); where it is not there, the report names the
command that makes it. No model is loaded here, and no TensorFlow.
"""

import dataclasses
import fnmatch
import hashlib
import io
import math
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Optional, Union

import numpy as np
from PIL import Image

from common import bd, bitstream, classical, data, datasets, hyper, results, runs
from common.report_content import Crop, Crops, NoCrop, Report, ReportError

SIDE = 192
_MAX_SIDE = 1024

# What all crops may take of the page, in bytes of PNG; base64 adds a third.
BUDGET = 3_500_000

# Rates that differ by less than this part are called equal.
_NEAR = math.log(1.15)

# A codec that took longer for the picture (seconds) codes it anew only if it is asked for by name.
_PATIENCE = 5.0

# A saved picture whose PSNR is off by more than this is not that of the results.
_TOLERANCE_DB = 0.02


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What to show.

  Attributes:
    image: Name of the picture, with or without its suffix; None for the data set's first.
    left, top: Of the piece, in pixels; None for where the decoded pictures differ most.
    side: Of the piece, in pixels.
    bpp: Rate of the picture; None for the one that all curves come nearest to.
    curves: Globs of labels, groups or codecs; empty for all.
  """

  image: Optional[str] = None
  left: Optional[int] = None
  top: Optional[int] = None
  side: int = SIDE
  bpp: Optional[float] = None
  curves: tuple[str, ...] = ()


def parse(crop: str, bpp: Optional[float], curves: Sequence[str]) -> Wanted:
  """From the command line: "", "IMAGE", "IMAGE:X,Y" or "IMAGE:X,Y,SIDE"; IMAGE may be empty.

  Raises:
    ReportError: It is neither.
  """
  match = re.fullmatch(r"([^:]*)(?::(\d+),(\d+)(?:,(\d+))?)?", crop)
  if match is None:
    raise ReportError(f"--crop={crop}: IMAGE, or IMAGE:X,Y or IMAGE:X,Y,SIDE in pixels.")
  image, left, top, side = match.groups()
  if side is not None and not 8 <= int(side) <= _MAX_SIDE:
    raise ReportError(f"--crop={crop}: a side has 8 to {_MAX_SIDE} pixels.")
  if bpp is not None and not (math.isfinite(bpp) and bpp > 0):
    raise ReportError(f"--crop_bpp={bpp}: bits per pixel, more than 0.")
  return Wanted(
    image=image or None,
    left=None if left is None else int(left),
    top=None if top is None else int(top),
    side=SIDE if side is None else int(side),
    bpp=bpp,
    curves=tuple(c for c in curves if c),
  )


@dataclasses.dataclass(frozen=True)
class _Candidate:
  """A curve's run whose rate is the nearest, and its record of the picture."""

  series: bd.Series
  result: results.ResultFile
  record: results.EvalRecord


@dataclasses.dataclass(frozen=True)
class _Picture:
  """A decoded picture, uint8 [H,W,3], and what it is."""

  candidate: _Candidate
  pixels: np.ndarray
  bpp: float
  psnr_db: Optional[float]
  remark: str = ""


def make(
  report: Report, dataset: str, wanted: Wanted, pictures_dir: Optional[runs.PathLike] = None
) -> Crops:
  """The crops of a report.

  Args:
    report: With its results.
    dataset: As the data set is found: a name or a path.
    wanted: What to show.
    pictures_dir: The results folder whose decoded pictures are used; that of the report if None.

  Raises:
    ReportError: No picture, no curve or no place of the picture is like what is wanted.
  """
  chosen = _series(report, wanted.curves)
  if not chosen:
    return Crops(problem="no curve was measured here")
  name = _image_name(report, wanted.image)
  if dataset.startswith(datasets.TFDS):
    return Crops(problem="pictures of TensorFlow Datasets are not read here")
  try:
    sources = [s for s in data.resolve(dataset) if s.name == name]
    original = sources[0].load() if sources else None
  except (data.DataError, OSError, ValueError) as e:
    return Crops(problem=f"the original cannot be read: {e}")
  if original is None:
    return Crops(problem=f"the data set {dataset!r} has no picture {name} here")
  points = {s.curve.label: _points(report, s, name) for s in chosen}
  target = wanted.bpp or common_rate([[r.record.bpp for r in p] for p in points.values() if p])
  found: list[_Picture] = []
  missing: list[NoCrop] = []
  for s in chosen:
    if not points[s.curve.label]:  # The pictures' hash is of pixels: names may differ.
      missing.append(NoCrop(s, f"its results have no picture called {name}"))
      continue
    nearest = min(points[s.curve.label], key=lambda c: abs(math.log(c.record.bpp / target)))
    pictures = pictures_dir or report.results_dir
    got = _decoded(report, nearest, original, dataset, pictures, patient=bool(wanted.curves))
    if isinstance(got, NoCrop):
      missing.append(got)
    else:
      found.append(got)
  box = _box(wanted, original, [p.pixels for p in found], name)
  crops, left_out = _within_budget(found, box)
  where = "as asked for" if wanted.left is not None else "where the decoded pictures differ most"
  which = "as asked for" if wanted.image else "the data set’s first"
  rate = "as asked for" if wanted.bpp else "the rate that all curves come nearest to"
  return Crops(
    image=name,
    box=box,
    target_bpp=target,
    original=_png(original, box),
    crops=tuple(crops),
    missing=(*missing, *left_out),
    chosen=f"Picture: {which}; place: {where}; rate: {rate}.",
  )


def _series(report: Report, globs: Sequence[str]) -> list[bd.Series]:
  own = [s for s in report.series if not s.published and report.members(s)]
  found: set[str] = set()
  for glob in globs:
    fitting = {
      s.curve.label
      for s in own
      for name in (s.curve.label, s.curve.group, s.curve.group.partition("-")[2])
      if fnmatch.fnmatchcase(name.casefold(), glob.casefold())
    }
    if not fitting:
      known = "; ".join(f"{s.curve.label} ({s.curve.group})" for s in own) or "none"
      raise ReportError(f"--crop_curves={glob}: no curve is called that. Known: {known}.")
    found |= fitting
  return [s for s in own if not globs or s.curve.label in found]


def _image_name(report: Report, wanted: Optional[str]) -> str:
  names = [r.image for r in report.loaded.results[0].records]
  if wanted is None:
    return names[0]
  for name in names:
    if wanted in (name, str(pathlib.PurePosixPath(name).with_suffix(""))):
      return name
  some = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
  raise ReportError(f"--crop={wanted}: no picture of the data set is called that. Known: {some}.")


def _points(report: Report, series: bd.Series, name: str) -> list[_Candidate]:
  return [
    _Candidate(series, result, record)
    for result in report.members(series)
    if not report.is_superseded(result)
    for record in result.records
    if record.image == name
  ]


def common_rate(curves: Sequence[Sequence[float]]) -> float:
  """The rate that every curve has a point near to, among the points' rates.

  Where all curves reach some rates, it is one of those; of several that are about as near to all,
  the lowest, for differences show there.

  Args:
    curves: Rates of the points of each curve, in bpp.
  """
  low, high = max(min(c) for c in curves), min(max(c) for c in curves)
  rates = sorted({b for c in curves for b in c})
  reached = [b for b in rates if low <= b <= high] or rates

  away = {r: max(min(abs(math.log(b / r)) for b in c) for c in curves) for r in reached}
  enough = max(min(away.values()), _NEAR)
  return min(r for r in reached if away[r] <= enough)


# --- Decoded pictures ----------------------------------------------------------------------------


def _decoded(
  report: Report,
  candidate: _Candidate,
  original: np.ndarray,
  dataset: str,
  pictures_dir: runs.PathLike,
  patient: bool,
) -> Union[_Picture, NoCrop]:
  """The decoded picture, or why there is none."""
  if candidate.result.run["family"] == classical.FAMILY:
    seconds = candidate.record.seconds_encode or 0.0
    if seconds > _PATIENCE and not patient:
      reason = f"coding it anew takes about {seconds:.0f} s; --crop_curves with its name does it"
      return NoCrop(candidate.series, reason)
    return _coded_anew(candidate, original)
  path = _saved(pictures_dir, candidate)
  if path is None:
    return NoCrop(
      candidate.series, "no decoded picture was saved", _command(report, candidate, dataset)
    )
  try:
    picture = data.read_image(path)
  except (OSError, ValueError, SyntaxError) as e:
    return NoCrop(
      candidate.series, f"{path}: not a picture ({e})", _command(report, candidate, dataset)
    )
  if not _is_that(picture, original, candidate.record):
    return NoCrop(
      candidate.series,
      f"{path} is not the picture of these results: another size or PSNR",
      _command(report, candidate, dataset),
    )
  return _Picture(candidate, picture, candidate.record.bpp, candidate.record.psnr_db)


def _coded_anew(candidate: _Candidate, original: np.ndarray) -> Union[_Picture, NoCrop]:
  run = candidate.result.run
  try:
    codec = classical.make(str(run["xid"]), int(run["wid"]))
    file = codec.compress(original)
    picture = codec.decompress(file)
  except (classical.ClassicalError, bitstream.BitstreamError, OSError, ValueError) as e:
    return NoCrop(candidate.series, str(e))
  if picture.shape != original.shape:
    return NoCrop(candidate.series, "the codec gives a picture of another size")
  same = len(file) == candidate.record.num_bytes and _is_that(picture, original, candidate.record)
  mse = _mse(picture, original)
  return _Picture(
    candidate,
    picture,
    8 * len(file) / (original.shape[0] * original.shape[1]),
    None if mse == 0 else 10 * math.log10(255**2 / mse),
    "" if same else "coded anew by another version of the codec: not the file of the results",
  )


def _saved(pictures_dir: runs.PathLike, candidate: _Candidate) -> Optional[pathlib.Path]:
  """The picture that the evaluation wrote, or that the iterative inference keeps in its run."""
  name = candidate.record.image
  folder = results.pictures_dir(pictures_dir, candidate.result)
  places = [folder / pathlib.PurePosixPath(name).with_suffix(".png")]
  workdir = candidate.result.run.get("workdir")
  if candidate.result.mode == "itinf" and workdir:
    safe = hyper.safe_name(name)
    if safe != name:
      safe += "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    places.append(results.located(workdir) / "images" / safe / "reconstruction.png")
  return next((p for p in places if p.is_file()), None)


def _is_that(picture: np.ndarray, original: np.ndarray, record: results.EvalRecord) -> bool:
  if picture.shape != original.shape:
    return False
  mse = _mse(picture, original)
  if mse == 0 or record.mse == 0:
    return mse == record.mse
  return abs(10 * math.log10(mse / record.mse)) < _TOLERANCE_DB


def _mse(picture: np.ndarray, original: np.ndarray) -> float:
  return float(np.mean((picture.astype(np.float64) - original) ** 2))


def _command(report: Report, candidate: _Candidate, dataset: str) -> str:
  """What makes the decoded picture where `_saved` looks for it."""
  result, name = candidate.result, candidate.record.image
  run = result.run
  folder = results.pictures_dir(report.results_dir, result)
  workdir = shlex.quote(str(run.get("workdir") or "RUN"))
  if result.mode == "itinf":
    return f"python -m {run['family']}.itinf, again: its run {workdir} is not here"
  if result.mode == "vbq":
    quantizer = result.config.get("quantizer") or {}
    if quantizer.get("method") != "vbq":
      return ""
    target = shlex.quote(str(folder / pathlib.PurePosixPath(name).with_suffix(".png")))
    # Rates are counted from the fewest bytes: the greatest lambda.
    settings = [m.config["quantizer"]["setting"] for m in report.members(candidate.series)]
    rate = sorted(settings, reverse=True).index(quantizer["setting"])
    return (
      f"./ntc.py compress {shlex.quote(name)} x.ntc --workdir {workdir} --rate {rate}; "
      f"./ntc.py decompress x.ntc {target} --workdir {workdir}"
    )
  mode = "" if result.mode == "bitstream" else f" --mode={result.mode}"
  return (
    f"python -m {run['family']}.eval --workdir {workdir} --step {result.step} "
    f"--dataset {shlex.quote(dataset)}{mode} --results_dir {shlex.quote(str(report.results_dir))} "
    f"--save_dir {shlex.quote(str(folder))}"
  )


# --- Pieces --------------------------------------------------------------------------------------


def _box(
  wanted: Wanted, original: np.ndarray, decoded: Sequence[np.ndarray], name: str
) -> tuple[int, int, int, int]:
  """(left, top, width, height) within the picture."""
  height, width = original.shape[:2]
  side_x, side_y = min(wanted.side, width), min(wanted.side, height)
  if wanted.left is None or wanted.top is None:
    return (*busiest(original, decoded, side_x, side_y), side_x, side_y)
  if wanted.left + side_x > width or wanted.top + side_y > height:
    raise ReportError(
      f"--crop: {name} has {width}x{height} pixels; a piece of {side_x}x{side_y} at "
      f"{wanted.left},{wanted.top} is not within."
    )
  return (wanted.left, wanted.top, side_x, side_y)


def busiest(
  original: np.ndarray, decoded: Sequence[np.ndarray], width: int, height: int
) -> tuple[int, int]:
  """(left, top) of the piece in which the pictures' squared errors differ most from one another.

  Of one decoded picture, its largest error; of none, the middle.

  Args:
    original: uint8 [H,W,3].
    decoded: uint8 [H,W,3] each.
    width: Of the piece.
    height: Of the piece.
  """
  rows, columns = original.shape[0] - height, original.shape[1] - width
  if not decoded or not (rows or columns):
    return columns // 2, rows // 2
  errors = [((p.astype(np.float32) - original) ** 2).mean(2) for p in decoded]
  sums = []
  for error in errors:
    whole = np.pad(error.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums.append(
      whole[height:, width:] - whole[:-height, width:] - whole[height:, :-width]
      + whole[:-height, :-width]
    )  # fmt: skip
  spread = np.max(sums, 0) - (np.min(sums, 0) if len(sums) > 1 else 0)
  top, left = np.unravel_index(int(np.argmax(spread)), spread.shape)
  return int(left), int(top)


def _within_budget(
  found: Sequence[_Picture], box: tuple[int, int, int, int]
) -> tuple[list[Crop], list[NoCrop]]:
  crops: list[Crop] = []
  left_out: list[NoCrop] = []
  used = 0
  for p in found:
    png = _png(p.pixels, box)
    if used + len(png) > BUDGET:
      reason = "the page would become too large; --crop_curves chooses some, a smaller SIDE helps"
      left_out.append(NoCrop(p.candidate.series, reason))
      continue
    used += len(png)
    runname = str(p.candidate.result.run["runname"])
    crops.append(Crop(p.candidate.series, runname, p.bpp, p.psnr_db, png, p.remark))
  return crops, left_out


def _png(picture: np.ndarray, box: tuple[int, int, int, int]) -> bytes:
  left, top, width, height = box
  file = io.BytesIO()
  Image.fromarray(picture[top : top + height, left : left + width]).save(file, "PNG", optimize=True)
  return file.getvalue()
