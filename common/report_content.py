"""What a report says, before it is drawn: curves, their comparison, costs; as text and as CSV."""

import csv
import dataclasses
import functools
import io
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Optional

import configs
from common import bd, report_cost, report_data, results, runs
from common.report_data import (
  LeftOut,
  Loaded,
  ReportError,
  RunStatus,
  Training,
  load,
  load_published,
  run_and_mode,
  run_key,
  run_statuses,
  select_published,
)

# More curves than this are not compared pair by pair: nobody reads 2,000 numbers.
MATRIX_CURVES = 40


@dataclasses.dataclass(frozen=True)
class Crop:
  """A piece of a picture as a curve's run decodes it.

  Attributes:
    series: The curve.
    runname: Of the run whose file it is.
    bpp: Of the whole picture.
    psnr_db: Of the whole picture; None where it came back without any error.
    png: The piece as a PNG file.
    remark: What to keep in mind.
  """

  series: bd.Series
  runname: str
  bpp: float
  psnr_db: Optional[float]
  png: bytes
  remark: str = ""


@dataclasses.dataclass(frozen=True)
class NoCrop:
  """A curve without a decoded picture: why, and the command that makes it."""

  series: bd.Series
  reason: str
  command: str = ""


@dataclasses.dataclass(frozen=True)
class Crops:
  """The same piece of one picture, of every curve at about one rate.

  Attributes:
    image: The picture's name; empty where there is none to show, then `problem` says why.
    box: (left, top, width, height) of the piece, in pixels.
    target_bpp: The rate that was looked for.
    original: The piece as a PNG file.
    crops: In the order of the curves.
    missing: The other curves.
    problem: Why there are none.
    chosen: How picture, place and rate were chosen.
  """

  image: str = ""
  box: tuple[int, int, int, int] = (0, 0, 0, 0)
  target_bpp: float = 0.0
  original: bytes = b""
  crops: tuple[Crop, ...] = ()
  missing: tuple[NoCrop, ...] = ()
  problem: str = ""
  chosen: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
  """All that a report says; `write` puts it into files.

  Attributes:
    dataset: The data set's name.
    title: The page's heading.
    loaded: The results.
    series: The curves, own ones first.
    anchor: One of `series`; None where there are none.
    comparisons: The others against it.
    statuses: The runs that were asked for, if any.
    problems: Files that could not be used.
    not_drawn: Published curves that were not asked for.
    matrix: Every curve against every other, the best against the anchor first.
    costs: What decoding costs, a curve each, in the order of `series`.
    results_dir: Where the results lie.
  """

  dataset: str
  title: str
  loaded: Loaded
  series: tuple[bd.Series, ...]
  anchor: Optional[bd.Series]
  comparisons: tuple[bd.Comparison, ...]
  statuses: tuple[RunStatus, ...]
  problems: tuple[LeftOut, ...]
  not_drawn: tuple[bd.Series, ...] = ()
  matrix: Optional[bd.Matrix] = None
  costs: tuple[report_cost.Cost, ...] = ()
  results_dir: pathlib.Path = pathlib.Path()

  def members(self, series: bd.Series) -> list[results.ResultFile]:
    """The results behind a curve, by rate; also those of earlier steps of its runs."""
    curve = series.curve
    found = [
      r
      for r in self.loaded.results
      if (results.group_of(r.run), r.mode) == (curve.group, curve.source)
    ]
    return sorted(found, key=lambda r: (r.mean("bpp") or 0, r.step))

  def is_superseded(self, result: results.ResultFile) -> bool:
    """Whether a later step of the same run stands for it in the curve."""
    return result.step < self._last_steps[run_and_mode(result)]

  @functools.cached_property
  def _last_steps(self) -> dict[tuple[str, ...], int]:
    last: dict[tuple[str, ...], int] = {}
    for r in self.loaded.results:
      key = run_and_mode(r)
      last[key] = max(r.step, last.get(key, r.step))
    return last

  def training(self, result: results.ResultFile) -> Optional[Training]:
    """What the training of the run took, where its records are here."""
    return self._trainings.get((report_data.trained_run(result.run), result.step))

  @functools.cached_property
  def _trainings(self) -> dict[tuple[str, int], Training]:
    of_run: dict[tuple[str, int], results.ResultFile] = {}
    # Those of the run itself know its size, those of latents that were optimised with it do not.
    for r in sorted(self.loaded.results, key=lambda r: "num_parameters" not in r.run):
      of_run.setdefault((report_data.trained_run(r.run), r.step), r)
    found = {key: report_data.training(r) for key, r in of_run.items() if key[0]}
    return {key: training for key, training in found.items() if training is not None}

  def machines(self) -> list[str]:
    """What the runs were trained on."""
    return sorted({t.machine for t in self._trainings.values() if t.machine})

  def state(self, result: results.ResultFile) -> str:
    """The state of the run that was measured, where the runs were asked for."""
    return next((s.state for s in self.statuses if s.key == run_key(result.run)), "")

  def without_results(self) -> list[RunStatus]:
    """The runs that were asked for and have no results here."""
    have = {run_key(r.run) for r in self.loaded.results}
    return [s for s in self.statuses if s.key not in have]


def build(
  dataset: str,
  results_dir: runs.PathLike,
  run_globs: Sequence[str] = (),
  anchor: Optional[str] = None,
  title: str = "",
  published_dir: Optional[runs.PathLike] = None,
  published: Sequence[str] = ("default",),
) -> Report:
  """Reads all that there is on a data set, and compares.

  Args:
    dataset: The data set's name.
    results_dir: Where results lie.
    run_globs: If given, only the results of these runs count (and those of classical codecs), and
      those of them that have none are listed.
    anchor: See `bd.pick_anchor`. A published curve that is the anchor is drawn in any case.
    title: The page's heading; the data set's name if empty.
    published_dir: Where published curves lie; `configs.PUBLISHED_DIR` if None.
    published: Which of them are drawn, see `select_published`.

  Raises:
    ReportError: There is nothing on this data set, or no published curve of that name.
    bd.AnchorError: No curve is called like the anchor.
    runs.RunError: A glob matches no run.
  """
  statuses = run_statuses(run_globs, dataset) if run_globs else []
  selected = {s.key for s in statuses if s.key is not None} if run_globs else None
  loaded = load(results_dir, dataset, selected)
  known, damaged = load_published(published_dir or configs.PUBLISHED_DIR, dataset)
  drawn = select_published(known, published)
  own = [bd.Series(c) for c in results.curves(loaded.results) if c.bpp]
  if anchor and known:
    drawn = _with_anchor(own, drawn, known, anchor)
  series = [*own, *drawn]
  if not (series or statuses or loaded.left_out or loaded.results):
    raise ReportError(_nothing(results_dir, dataset))
  chosen: Optional[bd.Series] = None
  if series:
    picked = bd.pick_anchor(series, anchor)
    index = next(i for i, s in enumerate(series) if s is picked)
    series = bd.arranged(series, picked)
    chosen = series[index]
  comparisons = bd.by_rate(bd.compare(chosen, series)) if chosen else []
  report = Report(
    dataset=dataset,
    title=title or dataset,
    loaded=loaded,
    series=tuple(series),
    anchor=chosen,
    comparisons=tuple(comparisons),
    statuses=tuple(statuses),
    problems=(*loaded.left_out, *damaged),
    not_drawn=tuple(s for s in known if s not in drawn),
    matrix=bd.matrix(_compared(_ranked(chosen, comparisons))) if chosen else None,
    results_dir=pathlib.Path(results_dir),
  )
  return dataclasses.replace(report, costs=tuple(_costs(report)))


def _ranked(anchor: bd.Series, comparisons: Sequence[bd.Comparison]) -> list[bd.Series]:
  """All curves in the order of the comparison, the anchor where its 0 % stands."""
  better = [c for c in comparisons if c.rate.value is not None and c.rate.value < 0]
  return [
    *(c.series for c in better), anchor, *(c.series for c in comparisons[len(better) :])
  ]  # fmt: skip


def _compared(ranked: Sequence[bd.Series]) -> list[bd.Series]:
  """The curves of the matrix: those of two points and more, the best ones where there are many."""
  return [s for s in ranked if len(bd.front(s.curve)) > 1][:MATRIX_CURVES]


def _costs(report: Report) -> list[report_cost.Cost]:
  profiles = report_cost.profiles(report.loaded.results)
  deltas = {c.series.curve.label: c.rate for c in report.comparisons}
  if report.anchor is not None:
    deltas[report.anchor.curve.label] = bd.Delta(0.0)
  return [
    report_cost.cost(
      s, [m for m in report.members(s) if not report.is_superseded(m)],
      deltas[s.curve.label], profiles,
    )
    for s in report.series
  ]  # fmt: skip


def _with_anchor(
  own: Sequence[bd.Series], drawn: list[bd.Series], known: Sequence[bd.Series], anchor: str
) -> list[bd.Series]:
  """`drawn`, and that one of the known published curves which is the anchor."""
  try:
    picked = bd.pick_anchor([*own, *known], anchor)
  except bd.AnchorError:
    if own or drawn:
      bd.pick_anchor([*own, *drawn], anchor)  # Clear among those that are drawn.
      return drawn
    raise
  return [s for s in known if s is picked or s in drawn]


def _nothing(results_dir: runs.PathLike, dataset: str) -> str:
  folder = pathlib.Path(results_dir)
  known = []
  if folder.is_dir():
    known = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != "published")
  message = f"No results of data set {dataset!r} in {str(folder)!r}."
  message += f" There are results of: {', '.join(known)}." if known else ""
  return (
    f"{message} Make some: python -m common.classical --dataset {dataset} --codec jpeg, or "
    f"python -m <family>.eval --workdir RUN --dataset {dataset}"
  )


# --- Tables --------------------------------------------------------------------------------------


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(header)
  writer.writerows([["" if v is None else v for v in row] for row in rows])
  return text.getvalue()


def curves_csv(series: Iterable[bd.Series]) -> str:
  """One row a point of a curve."""
  rows = []
  for s in series:
    c, p = s.curve, s.publication
    more = (p.rate, p.convention, p.reference) if p else ("", "", "")
    for i, (bpp, psnr) in enumerate(zip(c.bpp, c.psnr_db)):
      msssim = c.msssim_db[i] if c.msssim_db else None
      lpips = c.lpips[i] if c.lpips else None
      mse = c.mse[i] if c.mse else None
      rows.append([c.label, c.group, c.source, bpp, psnr, msssim, lpips, mse, *more])
  header = (
    "label", "group", "source", "bpp", "psnr_db", "msssim_db", "lpips", "mse",
    "published_rate", "convention", "reference",
  )  # fmt: skip
  return _csv(header, rows)


def records_csv(result_files: Iterable[results.ResultFile]) -> str:
  """One row a picture of a run."""
  run_fields = ("family", "xid", "wid", "runname")
  fields = [f.name for f in dataclasses.fields(results.EvalRecord)]
  rows = [
    [*(r.run[f] for f in run_fields), r.mode, r.step, *(getattr(record, f) for f in fields)]
    for r in result_files
    for record in r.records
  ]
  return _csv([*run_fields, "mode", "step", *fields], rows)


def bd_rate_csv(anchor: Optional[bd.Series], comparisons: Iterable[bd.Comparison]) -> str:
  """One row a curve; a refused value is empty, with the reason beside it."""
  header = [
    "anchor", "label", "group", "source", "points",
    "bd_rate_percent", "psnr_overlap_low_db", "psnr_overlap_high_db", "psnr_overlap_share",
    "bd_rate_remark",
    "bd_psnr_db", "rate_overlap_low_bpp", "rate_overlap_high_bpp", "bd_psnr_remark",
    "bd_rate_msssim_percent", "bd_rate_msssim_remark",
    "bd_rate_lpips_percent", "bd_rate_lpips_remark",
    "max_gain_db", "max_gain_bpp",
  ]  # fmt: skip
  rows = []
  for c in comparisons:
    curve = c.series.curve
    rows.append(
      [
        anchor.curve.label if anchor else "", curve.label, curve.group, curve.source,
        len(curve.bpp),
        c.rate.value, *(c.rate.overlap or (None, None)),
        c.rate.share if c.rate.value is not None else None, c.rate.remark,
        c.psnr.value, *(c.psnr.overlap or (None, None)), c.psnr.remark,
        c.rate_by_msssim.value, c.rate_by_msssim.remark,
        c.rate_by_lpips.value, c.rate_by_lpips.remark,
        c.gain.most_db if c.gain else None, c.gain.most_at if c.gain else None,
      ]
    )  # fmt: skip
  return _csv(header, rows)


def matrix_csv(matrix: Optional[bd.Matrix]) -> str:
  """One row a pair of curves; a refused value is empty, with the reason beside it."""
  matrix = matrix or bd.matrix([])
  header = [
    "anchor", "label", "bd_rate_percent", "psnr_overlap_low_db", "psnr_overlap_high_db",
    "psnr_overlap_share", "bd_rate_remark", "bd_psnr_db", "rate_overlap_low_bpp",
    "rate_overlap_high_bpp", "bd_psnr_remark",
  ]  # fmt: skip
  rows = []
  for s, rates, psnrs in zip(matrix.series, matrix.rates, matrix.psnrs):
    for anchor, rate, psnr in zip(matrix.series, rates, psnrs):
      if rate is not None and psnr is not None:
        share = rate.share if rate.value is not None else None
        rows.append(
          [
            anchor.curve.label, s.curve.label, rate.value, *(rate.overlap or (None, None)), share,
            rate.remark, psnr.value, *(psnr.overlap or (None, None)), psnr.remark,
          ]
        )  # fmt: skip
  return _csv(header, rows)


def costs_csv(costs: Iterable[report_cost.Cost]) -> str:
  """One row a curve; what is not known is empty, with the reason beside it."""
  header = [
    "label", "group", "bd_rate_percent", "bd_rate_remark", "decoder_flops_per_pixel_low",
    "decoder_flops_per_pixel", "decoder_flops_per_pixel_high", "flops_remark",
    "decode_seconds_per_megapixel_low", "decode_seconds_per_megapixel",
    "decode_seconds_per_megapixel_high", "seconds_remark", "device",
  ]  # fmt: skip
  nothing = (None, None, None)
  return _csv(
    header,
    [
      [
        c.series.curve.label, c.series.curve.group, c.rate.value, c.rate.remark,
        *(c.flops or nothing), c.flops_remark, *(c.seconds or nothing), c.seconds_remark,
        "; ".join(c.devices),
      ]
      for c in costs
    ],
  )  # fmt: skip


# --- Text ----------------------------------------------------------------------------------------


def summary(report: Report) -> str:
  """The BD-rates as text for a terminal."""
  if report.anchor is None:
    return "No curves yet."
  lines = [f"Anchor: {report.anchor.curve.label}"]
  width = max([len(c.series.curve.label) for c in report.comparisons] + [5])
  if report.comparisons:
    lines.append(f"{'Curve':<{width}}  {'BD-rate':>9}  {'BD-PSNR':>9}  Remark")
  for c in report.comparisons:
    rate = "-" if c.rate.value is None else f"{c.rate.value:+.1f} %"
    psnr = "-" if c.psnr.value is None else f"{c.psnr.value:+.2f} dB"
    remark = c.rate.remark
    if c.rate.overlap is not None:
      overlap = f"over {c.rate.overlap[0]:.2f} to {c.rate.overlap[1]:.2f} dB"
      remark = f"{overlap}; {remark}" if remark else overlap
    lines.append(f"{c.series.curve.label:<{width}}  {rate:>9}  {psnr:>9}  {remark}".rstrip())
  if report.not_drawn:
    names = ", ".join(s.publication.codec for s in report.not_drawn if s.publication)
    lines.append(f"Published, not drawn (--published=all, or names): {names}")
  return "\n".join(lines)
