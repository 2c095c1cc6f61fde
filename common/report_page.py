"""The report's page: one HTML file that loads nothing from elsewhere and runs no script."""

import base64
import datetime
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Optional

import configs
from common import bd, report_tables, results, runs
from common.bd import Series
from common.report_look import STYLE, code, count, escape, keys, row, swatch, table, theme
from common.report_plots import COST_AXES, Plot, why_not

if TYPE_CHECKING:
  from common.report_content import Crops, Report

# The table of more results than this is folded up.
_RUNS_SHOWN = 60

_CONVENTIONS = """
<ul>
<li><b>Rate</b>: 8 × bytes of the whole file, header included, over the picture’s pixels; then the
mean over pictures. “Estimate” is the negative log₂ likelihood, with no file behind it.</li>
<li><b>PSNR</b>: of uint8 RGB pictures, the error over the three channels together, peak 255; a PSNR
a picture, then the mean over pictures. Pictures that came back without any error have none and are
left out of the mean.</li>
<li><b>MS-SSIM</b>: five scales, mean of R, G and B, then over pictures; in dB it is
−10 log₁₀(1 − v) of that mean.</li>
<li><b>BD-rate</b>: the mean difference in rate at equal PSNR, over the PSNR that both curves reach,
by PCHIP through the log rates (package bjontegaard). Negative: fewer bits than the anchor. BD-PSNR
is the mean difference in PSNR at equal rate. “Of the curve” is the share of the curve’s own PSNR
range that the comparison covers. Points that another point of the same curve beats in both rate and
quality do not count.</li>
<li><b>Seconds</b>: wall time on the machine that measured it, of one picture at a time, from
the file to the pixels; compare within one machine only.</li>
<li><b>FLOPs per pixel</b>: of the synthesis transforms (with a hyperprior’s), two a multiply-add,
biases and GDN’s divisions counted as in published tables; entropy coding is not in them.</li>
<li><b>Chroma</b>: the subsampling of classical codecs is in their label; all metrics are taken in
RGB.</li>
<li>A “+” after a commit: with changes that were not committed.</li>
</ul>
"""


def page(
  report: "Report",
  plots: Sequence[Plot],
  crops: Optional["Crops"] = None,
  with_records: bool = True,
) -> str:
  """The HTML page; it loads nothing from elsewhere.

  Args:
    report: What it says.
    plots: Its plots, those of costs among them.
    crops: The same piece of a picture from every curve; None where none were asked for.
    with_records: Whether `records.csv` is beside it.
  """
  records = ", <code>records.csv</code> (every picture of every run)" if with_records else ""
  parts = [
    '<!doctype html><html lang="en"><head><meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width,initial-scale=1">',
    '<meta name="color-scheme" content="light dark">',
    f"<title>{escape(report.title)}: rate and distortion</title>",
    f"<style>{theme()}{STYLE}{_switches(report.series)}</style></head><body>",
    f"<header><h1>{escape(report.title)}</h1>",
    f'<p class="meta">{escape(_facts(report))}</p></header>',
    _notices(report),
    _curves(report, plots),
    _comparison(report),
    _matrix(report),
    _costs(report, plots),
    _crops(report, crops),
  ]
  if report.loaded.results:
    parts.append(f"<section><h2>Runs</h2>{_runs(report)}</section>")
  parts += [_missing(report), _left_out(report)]
  parts.append(f"<section><h2>How it was measured</h2>{_CONVENTIONS}{_sources(report)}</section>")
  parts.append(
    '<footer class="note">The numbers are beside this page: <code>curves.csv</code>, '
    "<code>bd_rate.csv</code>, <code>bd_matrix.csv</code> (every pair), <code>costs.csv</code>"
    f"{records}{_plot_files(plots)}.</footer>"
    "</body></html>\n"
  )
  return "\n".join(p for p in parts if p)


def _figure(plot: Plot) -> str:
  return f'<figure class="plot"><h3>{escape(plot.name)}</h3>{plot.inline}</figure>'


def _curves(report: "Report", plots: Sequence[Plot]) -> str:
  costs = [axis.file for axis in COST_AXES]
  figures = "".join(_figure(p) for p in plots if p.file not in costs)
  if not figures:
    return ""
  own, published = _legends(report.series)
  return (
    f'<section aria-label="Plots">{own}<div class="plots">{figures}</div>{published}'
    f'<p class="note">{escape(_plot_note(report))}</p></section>'
  )


def _comparison(report: "Report") -> str:
  if report.anchor is None:
    return ""
  label = escape(report.anchor.curve.label)
  if not report.comparisons:
    text = "<p>There is no other curve to compare.</p>"
  else:
    text = report_tables.comparison(report, report.anchor) + _trained_on(report)
    sentences = "".join(
      f"<li><b>{escape(c.series.curve.label)}</b>: {escape(bd.gain_sentence(c.gain))}</li>"
      for c in report.comparisons
      if not c.series.published
    )
    if sentences:
      text += (
        f"<details><summary>PSNR at equal bytes, against {label}</summary>"
        f"<ul>{sentences}</ul></details>"
      )
  return f"<section><h2>Compared with {label}</h2>{text}</section>"


def _trained_on(report: "Report") -> str:
  machines = report.machines()
  if len(machines) != 1:  # Of several, each curve names its own.
    return ""
  return (
    f'<p class="note">Trained on: {escape(machines[0])}. Minutes are wall time, beside whatever '
    "else ran there.</p>"
  )


def _matrix(report: "Report") -> str:
  if report.matrix is None or len(report.matrix.series) < 2:
    return ""
  left = len(report.series) - len(report.matrix.series)
  note = "Row against column. Below each number what both curves reach: "
  more = (
    " Pale: less than half of the row’s curve. The letters and numbers are those of the legends."
  )
  more += (
    f" {count(left, 'curve')} left out: of one point, or with the worst BD-rates." if left else ""
  )
  return (
    "<section><h2>Every curve against every other</h2>"
    '<div class="tabs"><input type="radio" name="delta" id="t-rate" checked/>'
    '<label for="t-rate">BD-rate, %</label><input type="radio" name="delta" id="t-psnr"/>'
    '<label for="t-psnr">BD-PSNR, dB</label>'
    f'<div class="tab">{report_tables.matrix(report, of_rate=True)}'
    f'<p class="note">{note}PSNR in dB. Negative: fewer bits than the anchor.{more}</p></div>'
    f'<div class="tab">{report_tables.matrix(report, of_rate=False)}'
    f'<p class="note">{note}bits per pixel. Positive: higher PSNR than the anchor.{more}</p></div>'
    "</div></section>"
  )


def _costs(report: "Report", plots: Sequence[Plot]) -> str:
  if not any(c.flops or c.seconds for c in report.costs):
    return ""
  figures = "".join(_figure(p) for axis in COST_AXES for p in plots if p.file == axis.file)
  anchor = f" against {report.anchor.curve.label}" if report.anchor else ""
  devices = dict.fromkeys(d for c in report.costs for d in c.devices)
  notes = [f"One dot a curve: its BD-rate{anchor}, and the median over its points; a line across a "
           "dot is their range. Below and left is better; dots on the dotted line are beaten by "
           "none."]  # fmt: skip
  if len(devices) == 1:
    notes.append(f"All seconds: {next(iter(devices))}.")
  elif devices:
    notes.append("The seconds are of several devices (see the table): compare within one only.")
  listed = []
  for axis in COST_AXES:
    items = [
      f"<li><b>{escape(c.series.curve.label)}</b>: {_with_command(why)}</li>"
      for c in report.costs
      if not c.series.published and (why := why_not(c, report.costs, axis))
    ]
    if items:
      listed.append(f'<h4>{escape(axis.name)}</h4><ul class="plain">{"".join(items)}</ul>')
  missing = ""
  if listed:
    missing = f"<details><summary>Not in these plots</summary>{''.join(listed)}</details>"
  return (
    f'<section><h2>What decoding costs</h2><div class="plots">{figures}</div>'
    f'<p class="note">{escape(" ".join(notes))}</p>{report_tables.costs(report)}{missing}</section>'
  )


def _with_command(remark: str) -> str:
  """A remark as HTML; what follows a semicolon and is a command, as code."""
  reason, found, command = remark.partition("; python -m ")
  if not found:
    return escape(remark)
  return f"{escape(reason)}. Measure it: <code>python -m {escape(command)}</code>"


def _crops(report: "Report", crops: Optional["Crops"]) -> str:
  if crops is None or (crops.problem and not report.loaded.results):
    return ""
  if crops.problem:
    return f"<section><h2>A piece of a picture</h2><p>None: {escape(crops.problem)}.</p></section>"
  left, top, width, height = crops.box
  known = keys(report.series)
  figures = [_crop_figure(crops.original, width, height, "<b>Original</b>", "")]
  for c in crops.crops:
    label = c.series.curve.label
    name = f'{swatch(c.series)}<b class="code">{code(known[label])}</b><b>{escape(label)}</b>'
    psnr = "without error" if c.psnr_db is None else f"{c.psnr_db:.2f} dB"
    said = f"{c.bpp:.3f} bpp, {psnr}<small>{escape(c.runname)}</small>"
    said += f"<small>{escape(c.remark)}</small>" if c.remark else ""
    figures.append(_crop_figure(c.png, width, height, name, said))
  missing = ""
  if crops.missing:
    items = "".join(
      f"<li><b>{escape(m.series.curve.label)}</b>: {escape(m.reason)}."
      + (f"<br><code>{escape(m.command)}</code>" if m.command else "")
      + "</li>"
      for m in crops.missing
    )
    missing = (
      f"<details><summary>Curves without a picture here: {len(crops.missing)}</summary>"
      f'<ul class="plain">{items}</ul></details>'
    )
  return (
    f"<section><h2>{escape(crops.image)} at about {crops.target_bpp:.2f} bpp</h2>"
    f'<p class="note">{width}×{height} pixels at {left},{top}. {escape(crops.chosen)} Rate and '
    "PSNR are those of the whole picture, of the run whose rate is the nearest: compare them "
    "before the pictures.</p>"
    f'<div class="crops">{"".join(figures)}</div>{missing}</section>'
  )


def _crop_figure(png: bytes, width: int, height: int, name: str, said: str) -> str:
  source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
  return (
    f'<figure><img width="{width}" height="{height}" alt="" src="{source}"/>'
    f'<figcaption><div class="curve">{name}</div>{said}</figcaption></figure>'
  )


def _legends(series: Sequence[Series]) -> tuple[str, str]:
  """Of own curves by family, of published ones by source; every curve has a switch."""
  known = keys(series)

  def item(s: Series, title: str) -> str:
    key = known[s.curve.label]
    return (
      f'<li><label class="{key}"><input type="checkbox" checked/>{swatch(s)}'
      f'<span><b class="code">{code(key)}</b>{escape(title)}</span></label></li>'
    )

  families: dict[str, list[str]] = {}
  for s in series:
    if not s.published:
      family = s.curve.group.partition("-")[0]
      families.setdefault(family, []).append(item(s, s.curve.label))
  sources: dict[str, list[str]] = {}
  for s, publication in _published(series):
    sources.setdefault(publication.source, []).append(item(s, publication.title))

  def lists(groups: dict[str, list[str]], kind: str) -> str:
    return "".join(
      f'<ul class="legend {kind}"><li class="source">{escape(name)}</li>{"".join(items)}</ul>'
      for name, items in groups.items()
    )

  return lists(families, "own"), lists(sources, "published")


def _published(series: Iterable[Series]) -> list[tuple[Series, results.Publication]]:
  return [(s, s.publication) for s in series if s.publication is not None]


def _switches(series: Iterable[Series]) -> str:
  """Styles of curves: hidden by their switch, in front of all others where one points at them."""
  rules = []
  for key in keys(series).values():
    of = f"body:has(label.{key}"
    seen = f"{of}:hover,label.{key} :focus-visible)"
    rules.append(
      f"{of} input:not(:checked)) g.{key}{{display:none}}"
      f"{seen} :is(.line,.dots,.end):not(.{key}){{opacity:.15}}"
      f"{seen} g.{key}.line path,g.{key}.line:hover path{{stroke-width:3!important}}"
    )
    if key[0] == "p":
      rules.append(
        f":is({seen} g.{key},g.{key}:hover):not(.end) :is(path,use){{stroke:var(--ink)!important}}"
        f"{seen} g.{key} text{{fill:var(--ink)!important}}"
      )
  return "".join(rules)


def _facts(report: "Report") -> str:
  facts = []
  found = report.loaded.results
  if found:
    facts.append(f"{len(found[0].records)} pictures (hash {found[0].dataset['hash'][:12]})")
  facts.append(count(len(found), "result"))
  facts.append(count(sum(not s.published for s in report.series), "curve"))
  published = sum(s.published for s in report.series)
  facts += [f"{published} published"] if published else []
  facts.append(datetime.datetime.now().strftime("%Y-%m-%d %H:%M"))
  commit = runs.git_state(configs.PROJECT_DIR)
  if commit["commit"]:
    facts.append(f"commit {commit['commit'][:7]}{'+' if commit['dirty'] else ''}")
  return " · ".join(facts)


def _notices(report: "Report") -> str:
  notices = []
  without = report.without_results()
  if without:
    notices.append(f"{count(len(without), 'run')} of those asked for: no results (listed below).")
  if report.problems:
    notices.append(f"{count(len(report.problems), 'file')} left out (listed below).")
  if report.loaded.other_pictures:
    notices.append(
      f"{count(report.loaded.other_pictures, 'result')} measured on other pictures of the same "
      "data set’s name (another hash): left out, for they cannot be compared with these."
    )
  if report.loaded.not_selected:
    others = count(report.loaded.not_selected, "result")
    notices.append(f"{others} of other runs not shown (--runs).")
  records = [r for result in report.loaded.results for r in result.records]
  lossless = sum(r.mse == 0 for r in records)
  if lossless:
    notices.append(
      f"{count(lossless, 'record')} without any error: no PSNR, left out of the means."
    )
  fewer = {r.image for r in records if r.msssim_scales is not None and r.msssim_scales < 5}
  if fewer:
    notices.append(f"{count(len(fewer), 'picture')} too small for five scales of MS-SSIM.")
  if not notices:
    return ""
  return f'<div class="notice">{"".join(f"<p>{escape(n)}</p>" for n in notices)}</div>'


def _plot_note(report: "Report") -> str:
  own = any(not s.published for s in report.series)
  notes = ["One colour an experiment, one dot a run."] if own else []
  if any(s.curve.source not in ("bitstream", "published") for s in report.series):
    notes.append("Filled: sizes of files; hollow and dashed: other rates (see the labels).")
  if any(s.published for s in report.series):
    notes.append(
      "Grey and numbered: published curves; whole lines are files or coded streams, dashes "
      "estimates, dots not stated."
    )
  kinds = {s.curve.group.startswith("classical-") for s in report.series if not s.published}
  if len(kinds) == 2:
    notes.append("The axes end where the runs do; classical codecs go on.")
  if own:
    notes.append("Points far from those of most curves are outside the axes.")
  notes.append("Point at a curve’s name to see it alone, untick it to hide it, also below.")
  return " ".join(notes)


def _plot_files(plots: Sequence[Plot]) -> str:
  names = [f"<code>{p.file}</code>" for p in plots]
  return f", and the plots with a legend as .svg and .png: {', '.join(names)}" if names else ""


def _runs(report: "Report") -> str:
  text, number = report_tables.runs(report), len(report.loaded.results)
  if number <= _RUNS_SHOWN:
    return text
  return f"<details><summary>All {number} results, curve by curve</summary>{text}</details>"


def _missing(report: "Report") -> str:
  without = report.without_results()
  if not without:
    return ""
  columns = [("Run", "name"), ("State", ""), ("", "remark")]
  rows = [
    row(
      columns,
      [
        f"<code>{escape(s.path.parent.name)}/{escape(s.path.name)}</code>",
        escape(s.state),
        escape(s.detail),
      ],
    )
    for s in without
  ]
  return f"<section><h2>Runs without results</h2>{table(columns, rows)}</section>"


def _left_out(report: "Report") -> str:
  if not report.problems:
    return ""
  columns = [("File", "name"), ("Why", "remark")]
  rows = [
    row(columns, [f"<code>{escape(p.path.name)}</code>", escape(p.reason)]) for p in report.problems
  ]
  return f"<section><h2>Files left out</h2>{table(columns, rows)}</section>"


def _sources(report: "Report") -> str:
  """How published curves were measured, and which of them are not drawn."""
  said: dict[str, dict[str, list[str]]] = {}
  for number, (_, p) in enumerate(_published(report.series), 1):
    name = f"<b>{number}</b>&ensp;{escape(p.title)}"
    name += f"<small><code>{escape(p.reference)}</code></small>" if p.reference else ""
    said.setdefault(p.source, {}).setdefault(p.convention, []).append(f"<li>{name}</li>")
  items = ""
  for source, conventions in said.items():
    items += f"<h4>{escape(source)}</h4>"
    for convention, names in conventions.items():
      items += f'<p>{escape(convention)}</p><ul class="curves">{"".join(names)}</ul>'
  others = ", ".join(
    f"{escape(p.title)} (<code>{escape(p.codec)}</code>)" for _, p in _published(report.not_drawn)
  )
  if others:
    items += f"<h4>Not drawn</h4><p>Ask with --published=all, or by name: {others}.</p>"
  if not items:
    return ""
  return f'<details class="note"><summary>Published curves</summary>{items}</details>'
