"""The report of a data set: rate-distortion plots, BD-rates and all runs, on one offline page.

    python -m common.report --dataset kodak
    python -m common.report --dataset kodak --runs 'train_xms/*' --anchor jpeg444
    python -m common.report --dataset kodak --published default,hm,tcm-*

Reads every results file of the data set (`common.results`) and the published curves of
`json_results/published/*.json`; their format is described in `json_results/README.md`. Writes
`index.html`, a plot a metric as SVG and PNG, `curves.csv`, `records.csv` and `bd_rate.csv`.
"""

import contextlib
import csv
import dataclasses
import fnmatch
import functools
import io
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Optional

from absl import flags as absl_flags

import configs
from common import bd, datasets, flags, hyper, report_page, results, runs

USAGE = """
python -m common.report --dataset NAME [--runs 'train_xms/*'] [--anchor LABEL]
    [--published all|none|NAME,...]

Draws the results of a data set into <out>/index.html, with plots (SVG, PNG) and tables (CSV).
"""

PUBLISHED_SCHEMA_VERSION = 1

# The terminal names this many files or runs of a kind; the page names all.
_SAID = 10


class ReportError(ValueError):
  """There is nothing to report; the message names the fix."""


# --- Reading -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """A file that the report does not use, and why."""

  path: pathlib.Path
  reason: str


@dataclasses.dataclass(frozen=True)
class Loaded:
  """The usable results of a data set.

  Attributes:
    results: Of one set of pictures, in the order of their files.
    left_out: Damaged files, those of other pictures, repeated ones.
    not_selected: How many results belong to other runs than those asked for.
    other_pictures: How many of `left_out` were measured on other pictures.
  """

  results: tuple[results.ResultFile, ...]
  left_out: tuple[LeftOut, ...]
  not_selected: int = 0
  other_pictures: int = 0


RunKey = tuple[str, str, str]  # family, xid, wid


def run_key(run: Mapping[str, Any]) -> RunKey:
  """What identifies a run in its results."""
  return (str(run["family"]), str(run["xid"]), str(run["wid"]))


def load(
  results_dir: runs.PathLike, dataset: str, selected: Optional[set[RunKey]] = None
) -> Loaded:
  """Reads the results of a data set.

  Args:
    results_dir: Where results lie.
    dataset: The data set's name.
    selected: If given, results of other runs are left out; classical codecs are kept.

  Returns:
    Results that were all measured on the same pictures. Where files disagree on the pictures'
    hash, the set that most files share counts, and the other files are in `left_out`.
  """
  found: list[tuple[pathlib.Path, results.ResultFile]] = []
  left_out: list[LeftOut] = []
  not_selected = 0
  for path in results.find(results_dir, dataset):
    try:
      result = results.read(path)
      _check(result, dataset)
    except (results.ResultError, OSError, KeyError, TypeError, ValueError, AttributeError) as e:
      left_out.append(LeftOut(path, _reason(e, path)))
      continue
    if str(result.run["xid"]).startswith("_"):
      continue
    trained = result.run["family"] != "classical"
    if selected is not None and trained and run_key(result.run) not in selected:
      not_selected += 1
      continue
    found.append((path, result))
  # Of copies, the one counts that has the name it was written with.
  found.sort(key=lambda f: f[0].name != _file_name(f[1]))
  usable: list[tuple[pathlib.Path, results.ResultFile]] = []
  seen: dict[tuple[Any, ...], pathlib.Path] = {}
  count: dict[str, int] = {}
  for path, result in found:
    identity = (*_run_and_mode(result), result.step)
    if identity in seen:
      left_out.append(LeftOut(path, f"repeats {seen[identity].name}"))
      continue
    seen[identity] = path
    usable.append((path, result))
    count[result.dataset["hash"]] = count.get(result.dataset["hash"], 0) + 1
  others = 0
  if len(count) > 1:
    kept = max(count, key=lambda h: count[h])
    for path, result in usable:
      if result.dataset["hash"] != kept:
        others += 1
        left_out.append(
          LeftOut(
            path,
            f"measured on other pictures ({len(result.records)} of hash "
            f"{result.dataset['hash'][:12]}; the report is of hash {kept[:12]})",
          )
        )
    usable = [(p, r) for p, r in usable if r.dataset["hash"] == kept]
  return Loaded(tuple(r for _, r in usable), tuple(left_out), not_selected, others)


def _file_name(result: results.ResultFile) -> str:
  name = result.dataset["name"]
  return results.result_path("", name, result.mode, result.run, result.step).name


def _reason(error: Exception, path: pathlib.Path) -> str:
  """An error about a file, for a place where the file is named already."""
  text = f"no field {error}" if isinstance(error, KeyError) else str(error)
  for name in (f"Record {str(path)!r} ", f"{path}: ", f"{path} "):
    text = text.replace(name, "")
  return text


def _check(result: results.ResultFile, dataset: str) -> None:
  """Raises what `load` catches if the file cannot be used for this data set."""
  run_key(result.run)
  str(result.run["runname"])
  name = str(result.dataset["name"])
  if hyper.safe_name(name) != hyper.safe_name(dataset):
    raise ValueError(f"of data set {name!r}")
  if not isinstance(result.dataset["hash"], str):
    raise ValueError("the pictures' hash is no text")
  if not isinstance(result.step, int) or not isinstance(result.run.get("label") or "", str):
    raise ValueError(f"step {result.step!r}, label {result.run.get('label')!r}")
  if result.mode not in results.MODES:
    raise ValueError(f"unknown mode {result.mode!r}")
  if not result.records or len(result.records) != len(result.dataset["images"]):
    raise ValueError(
      f"{len(result.records)} records of {len(result.dataset['images'])} pictures: not complete"
    )
  for record in result.records:
    if not (math.isfinite(record.bpp) and record.bpp > 0 and record.num_pixels > 0):
      raise ValueError(f"{record.image}: {record.bpp} bpp, {record.num_pixels} pixels")
  for field in ("psnr_db", "msssim", "lpips", "bpp_estimated", "seconds_encode", "seconds_decode"):
    result.mean(field)


def load_published(folder: runs.PathLike, dataset: str) -> tuple[list[bd.Series], list[LeftOut]]:
  """The published curves of a data set; files that cannot be read are in the second list."""
  series: list[bd.Series] = []
  left_out: list[LeftOut] = []
  for path in sorted(pathlib.Path(folder).glob("*.json")):
    try:
      content = runs.read_json(path)
      version = content["schema_version"]
      if version != PUBLISHED_SCHEMA_VERSION:
        raise ValueError(f"schema version {version!r}; this code reads {PUBLISHED_SCHEMA_VERSION}")
      series += [_published(c) for c in content["curves"] if c["dataset"] == dataset]
    except (runs.RunError, OSError, KeyError, TypeError, ValueError, AttributeError) as e:
      left_out.append(LeftOut(path, _reason(e, path)))
  return series, left_out


def select_published(series: Sequence[bd.Series], wanted: Iterable[str]) -> list[bd.Series]:
  """The published curves that are asked for, in their order.

  Args:
    series: Published curves of one data set.
    wanted: "all", "none", "default" (all but those `on_request`), globs of codec names or sources.

  Raises:
    ReportError: A name or glob fits no curve.
  """
  chosen: set[int] = set()
  for name in (w.strip().casefold() for w in wanted):
    found = {
      i
      for i, p in enumerate(s.publication for s in series)
      if p is not None
      and (
        name == "all"
        or (name == "default" and not p.on_request)
        or fnmatch.fnmatchcase(p.codec.casefold(), name)
        or fnmatch.fnmatchcase(p.source.casefold(), name)
      )
    }
    if not found and name not in ("", "all", "default", "none"):
      known = ", ".join(s.publication.codec for s in series if s.publication) or "none"
      raise ReportError(
        f"--published={name}: no published curve of this data set is called that. Known: {known}."
      )
    chosen |= found
  return [s for i, s in enumerate(series) if i in chosen]


def _published(record: Mapping[str, Any]) -> bd.Series:
  label, bpp = str(record["label"]), record["bpp"]
  columns: dict[str, Optional[list[float]]] = {"bpp": bpp, "psnr_db": record["psnr_db"]}
  columns.update({field: record.get(field) for field in ("msssim_db", "lpips")})
  points: dict[str, Optional[tuple[float, ...]]] = {}
  for field, values in columns.items():
    if values is not None and len(values) != len(bpp):
      raise ValueError(f"{label!r}: {len(bpp)} values of bpp, {len(values)} of {field}")
    if values is not None and not all(math.isfinite(v) for v in values):
      raise ValueError(f"{label!r}: {field} is not finite everywhere")
  if not bpp or min(bpp) <= 0:
    raise ValueError(f"{label!r}: no points, or a rate of 0")
  publication = results.Publication(
    title=label,
    codec=str(record.get("codec", label)),
    source=str(record["source"]),
    convention=str(record["convention"]),
    rate=str(record.get("rate", "not stated")),
    reference=" ".join(
      [*([record["commit"]] if "commit" in record else ()), *record.get("files", ())]
    ),
    on_request=bool(record.get("on_request", False)),
  )
  if publication.rate not in results.PUBLISHED_RATES:
    known = ", ".join(results.PUBLISHED_RATES)
    raise ValueError(f"{label!r}: rate {publication.rate!r}; known: {known}")
  order = sorted(range(len(bpp)), key=lambda i: (bpp[i], record["psnr_db"][i]))
  for field, values in columns.items():
    points[field] = None if values is None else tuple(float(values[i]) for i in order)
  return bd.Series(
    results.RDCurve(
      label=f"{label} [{publication.source}]",
      source="published",
      group=f"published-{publication.codec}",
      **points,  # type: ignore[arg-type]
    ),
    publication,
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


@dataclasses.dataclass(frozen=True)
class RunStatus:
  """A run directory, for those that were asked for.

  Attributes:
    path: The run directory.
    key: What its results are known by; None where its record is damaged.
    state: See `runs.STATES`; "?" where none is recorded.
    detail: Step and reason of the state, or what is wrong with the record.
  """

  path: pathlib.Path
  key: Optional[RunKey]
  state: str
  detail: str


def run_statuses(patterns: Sequence[str]) -> list[RunStatus]:
  """The runs that match the globs; experiments whose name starts with `_` are left out.

  Raises:
    runs.RunError: A glob matches no run.
  """
  found: dict[pathlib.Path, RunStatus] = {}
  for pattern in patterns:
    for run in runs.find_runs(pattern):
      if not run.path.parent.name.startswith("_"):
        found[run.path] = _run_status(run)
  return list(found.values())


def _run_status(run: runs.RunDir) -> RunStatus:
  state = run.read_state()
  details = [f"step {state['step']}"] if "step" in state else []
  details += [str(state["reason"])] if state.get("reason") else []
  try:
    record = run.read_record()
    unit = record["work_unit"]
    key = (str(unit["family"]), str(record["xid"]), str(unit["wid"]))
  except (runs.RunError, OSError, KeyError, TypeError, AttributeError) as e:
    return RunStatus(run.path, None, "?", f"its record is damaged: {e}")
  return RunStatus(run.path, key, str(state.get("state", "?")), ", ".join(details))


# --- The report ----------------------------------------------------------------------------------


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
    return result.step < self._last_steps[_run_and_mode(result)]

  @functools.cached_property
  def _last_steps(self) -> dict[tuple[str, ...], int]:
    last: dict[tuple[str, ...], int] = {}
    for r in self.loaded.results:
      key = _run_and_mode(r)
      last[key] = max(r.step, last.get(key, r.step))
    return last

  def state(self, result: results.ResultFile) -> str:
    """The state of the run that was measured, where the runs were asked for."""
    return next((s.state for s in self.statuses if s.key == run_key(result.run)), "")

  def without_results(self) -> list[RunStatus]:
    """The runs that were asked for and have no results here."""
    have = {run_key(r.run) for r in self.loaded.results}
    return [s for s in self.statuses if s.key not in have]


def _run_and_mode(result: results.ResultFile) -> tuple[str, ...]:
  return (*run_key(result.run), str(result.run["runname"]), result.mode)


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
  statuses = run_statuses(run_globs) if run_globs else []
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
  return Report(
    dataset=dataset,
    title=title or dataset,
    loaded=loaded,
    series=tuple(series),
    anchor=chosen,
    comparisons=tuple(bd.compare(chosen, series)) if chosen else (),
    statuses=tuple(statuses),
    problems=(*loaded.left_out, *damaged),
    not_drawn=tuple(s for s in known if s not in drawn),
  )


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


def write(report: Report, out: runs.PathLike) -> pathlib.Path:
  """Writes the report's files, each whole; returns the page's path.

  Plots of an earlier report that this one does not have are removed.
  """
  folder = pathlib.Path(out)
  titles = {
    (s.curve.label, float(r.mean("bpp") or 0)): str(r.run["runname"])
    for s in report.series
    for r in report.members(s)
  }
  drawings = [report_page.draw(report.series, m, titles, report.title) for m in bd.METRICS]
  plots = [p for p in drawings if p is not None]
  drawn = {p.metric.file for p in plots}
  for metric in bd.METRICS:
    if metric.file not in drawn:
      for suffix in (".svg", ".png"):
        with contextlib.suppress(FileNotFoundError):
          (folder / f"{metric.file}{suffix}").unlink()
  for plot in plots:
    runs.atomic_write(folder / f"{plot.metric.file}.svg", plot.svg)
    runs.atomic_write(folder / f"{plot.metric.file}.png", plot.png)
  runs.atomic_write(folder / "curves.csv", curves_csv(report.series))
  runs.atomic_write(folder / "records.csv", records_csv(report.loaded.results))
  runs.atomic_write(folder / "bd_rate.csv", bd_rate_csv(report.anchor, report.comparisons))
  runs.atomic_write(folder / "index.html", report_page.page(report, plots))
  return folder / "index.html"


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


# --- The command ---------------------------------------------------------------------------------


def _define(values: absl_flags.FlagValues) -> None:
  def define(name: str, default: Optional[str], text: str) -> None:
    absl_flags.DEFINE_string(name, default, text, flag_values=values)

  define("dataset", None, "The data set whose results to draw.")
  define("results_dir", str(configs.RESULTS_DIR), "Where results lie.")
  define("out", None, f"Folder of the report (default: {configs.REPORTS_DIR}/<dataset>).")
  define("anchor", None, "Curve to compare with: its label, or codec name (default: JPEG).")
  define("title", "", "Heading of the page (default: the data set).")
  absl_flags.DEFINE_list(
    "runs", [], "Globs of run directories: only these, and which of them have no results.",
    flag_values=values,
  )  # fmt: skip
  absl_flags.DEFINE_list(
    "published", ["default"],
    "Published curves to draw: all, none, default, or globs of their names or sources.",
    flag_values=values,
  )  # fmt: skip


def run(argv: Sequence[str], say: Callable[[str], None] = print) -> pathlib.Path:
  """The command; `argv` without the program's name. Returns the page's path.

  Raises:
    flags.UsageError, ReportError, bd.AnchorError, runs.RunError: The message names the fix.
  """
  values, _, _ = flags.parse(argv, _define, USAGE, allow_config=False)
  if not values.dataset:
    raise flags.UsageError("--dataset is needed, for example --dataset=kodak.")
  dataset = values.dataset
  if not (pathlib.Path(values.results_dir) / hyper.safe_name(dataset)).is_dir():
    dataset = datasets.label(dataset)  # A path, as the evaluation was given it.
  report = build(
    dataset, values.results_dir, values.runs, values.anchor, values.title,
    published=values.published,
  )  # fmt: skip
  path = write(report, values.out or configs.REPORTS_DIR / hyper.safe_name(dataset))
  say(summary(report))
  for lines in (
    [f"No results: {s.path} ({', '.join(t for t in (s.state, s.detail) if t)})"
     for s in report.without_results()],
    [f"Left out: {p.path}: {p.reason}" for p in report.problems],
  ):  # fmt: skip
    for line in lines[:_SAID]:
      say(line)
    if len(lines) > _SAID:
      say(f"... and {len(lines) - _SAID} more; the page lists them all.")
  say(f"Report: {path.absolute()}")
  return path


def main() -> None:
  """The command line."""
  try:
    run(sys.argv[1:])
  except (flags.UsageError, ReportError, bd.AnchorError, runs.RunError, OSError) as e:
    flags.fail(e)


if __name__ == "__main__":
  main()
