"""The report of a data set: rate-distortion plots, BD-rates and all runs, on one offline page.

    python -m common.report --dataset kodak
    python -m common.report --dataset kodak --runs 'train_xms/*' --anchor jpeg444
    python -m common.report --dataset kodak --published default,hm,tcm-*
    python -m common.report --dataset kodak --crop kodim19:300,200,160 --crop_bpp 0.5

Reads every results file of the data set (`common.results`) and the published curves of
`json_results/published/*.json`; their format is described in `json_results/README.md`. Writes
`index.html`, each plot as SVG and PNG, `crops/*.png`, and the numbers: `curves.csv`, `records.csv`,
`bd_rate.csv`, `bd_matrix.csv`, `costs.csv`.
"""

import contextlib
import gc
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Optional, Union

# Curves of a few points are nothing for many threads, which took a third of the time to start and
# stop; must be set before numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from absl import flags as absl_flags

import configs
from common import bd, datasets, flags, hyper, report_crops, report_page, report_plots, runs
from common.report_content import (
  Crops,
  Report,
  ReportError,
  bd_rate_csv,
  build,
  costs_csv,
  curves_csv,
  matrix_csv,
  records_csv,
  summary,
)
from common.report_look import count, keys

USAGE = """
python -m common.report --dataset NAME [--runs 'train_xms/*'] [--anchor LABEL]
    [--published all|none|NAME,...] [--crop none|IMAGE[:X,Y[,SIDE]]] [--crop_bpp BPP]

Draws the results of a data set into <out>/index.html, with plots (SVG, PNG) and tables (CSV).
"""

# The terminal names this many files or runs of a kind; the page names all.
_SAID = 10


def write(
  report: Report, out: runs.PathLike, crops: Optional[Crops] = None, compact: bool = False
) -> pathlib.Path:
  """Writes the report's files, each whole; returns the page's path.

  What an earlier report had and this one has not is removed.

  Args:
    report: What it says.
    out: Its folder.
    crops: The same piece of a picture from every curve.
    compact: Whether to leave out `records.csv` and `crops/*.png`: the results hold the one, the
      page the other.
  """
  folder = pathlib.Path(out)
  plots = draw(report)
  files: dict[str, Union[str, bytes]] = {}
  for plot in plots:
    files[f"{plot.file}.svg"] = plot.svg
    files[f"{plot.file}.png"] = plot.png
  if not compact:
    files.update(_crop_files(report, crops))
    files["records.csv"] = records_csv(report.loaded.results)
  earlier = [f"{file}{suffix}" for file in report_plots.FILES for suffix in (".svg", ".png")]
  earlier += ["records.csv"]
  earlier += [f"crops/{p.name}" for p in (folder / "crops").glob("[0-9][0-9]-*.png")]
  for name in earlier:
    if name not in files:
      with contextlib.suppress(FileNotFoundError):
        (folder / name).unlink()
  files["curves.csv"] = curves_csv(report.series)
  files["bd_rate.csv"] = bd_rate_csv(report.anchor, report.comparisons)
  files["bd_matrix.csv"] = matrix_csv(report.matrix)
  files["costs.csv"] = costs_csv(report.costs)
  files["index.html"] = report_page.page(report, plots, crops, not compact)
  for name, content in files.items():
    runs.atomic_write(folder / name, content)
  return folder / "index.html"


def draw(report: Report) -> list[report_plots.Plot]:
  """All plots that there is something to draw in."""
  titles = {
    (s.curve.label, float(r.mean("bpp") or 0)): str(r.run["runname"])
    for s in report.series
    for r in report.members(s)
  }
  known = keys(report.series)
  plots = [report_plots.draw(report.series, m, titles, report.title) for m in bd.METRICS]
  plots += [
    report_plots.draw_cost(report.costs, axis, known, report.title)
    for axis in report_plots.COST_AXES
  ]
  return [p for p in plots if p is not None]


def _crop_files(report: Report, crops: Optional[Crops]) -> dict[str, bytes]:
  if crops is None or not crops.image:
    return {}
  files = {"crops/00-original.png": crops.original}
  for number, crop in enumerate(crops.crops, 1):
    name = hyper.safe_name(f"{crop.series.curve.group}-{crop.runname}")[:120]
    files[f"crops/{number:02d}-{name}.png"] = crop.png
  return files


# --- The command ---------------------------------------------------------------------------------


def _define(values: absl_flags.FlagValues) -> None:
  def define(name: str, default: Optional[str], text: str) -> None:
    absl_flags.DEFINE_string(name, default, text, flag_values=values)

  define("dataset", None, "The data set whose results to draw.")
  define("results_dir", str(configs.RESULTS_DIR), "Where results lie.")
  define("pictures_dir", None, "Where the decoded pictures of results lie (default: beside them).")
  define("out", None, f"Folder of the report (default: {configs.REPORTS_DIR}/<dataset>).")
  define("anchor", None, "Curve to compare with: its label, or codec name (default: JPEG).")
  define("title", "", "Heading of the page (default: the data set).")
  define("crop", "", "Piece of a picture to show of every curve: IMAGE, or IMAGE:X,Y[,SIDE]; none.")
  absl_flags.DEFINE_float(
    "crop_bpp", None, "Rate of these pieces (default: one that all curves reach).",
    flag_values=values,
  )  # fmt: skip
  absl_flags.DEFINE_list(
    "crop_curves", [], "Curves of these pieces: globs of labels or codecs (default: all).",
    flag_values=values,
  )  # fmt: skip
  absl_flags.DEFINE_list(
    "runs", [], "Globs of run directories: only these, and which of them have no results.",
    flag_values=values,
  )  # fmt: skip
  absl_flags.DEFINE_bool(
    "compact", False, "Write neither records.csv nor crops/*.png, for a report under version "
    "control: the results hold the one, the page the other.", flag_values=values,
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
  crops = None
  if values.crop != "none":
    wanted = report_crops.parse(values.crop, values.crop_bpp, values.crop_curves)
    crops = report_crops.make(report, values.dataset, wanted, values.pictures_dir)
  out = values.out or configs.REPORTS_DIR / hyper.safe_name(dataset)
  path = write(report, out, crops, values.compact)
  say(summary(report))
  if crops is not None and crops.missing:
    say(f"No decoded picture: {count(len(crops.missing), 'curve')}; the page names the commands.")
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
  gc.disable()  # The program ends before there is much to collect: a tenth of its time.
  main()
