"""The tables of the report's page, as HTML."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Optional

from common import bd, report_data, results
from common.bd import Series
from common.report_cost import Cost, Range
from common.report_look import code, escape, keys, number, row, swatch, table
from common.report_plots import FLOPS, SECONDS, CostAxis

if TYPE_CHECKING:
  from common.report_content import Report

_MODE_NAMES = {
  "bitstream": "files",
  "estimated": "estimate",
  "itinf": "files, optimised latents",
  "vbq": "files, VBQ",
}


def curve_cell(series: Series, known: Mapping[str, str], remarks: Iterable[str] = ()) -> str:
  """A curve's swatch, code and name, with remarks below."""
  said = "; ".join(dict.fromkeys(r for r in remarks if r))
  small = f"<small>{escape(said)}</small>" if said else ""
  label = series.curve.label
  name = f'<b class="code">{code(known[label])}</b><span>{escape(label)}{small}</span>'
  return f'<div class="curve">{swatch(series)}{name}</div>'


def comparison(report: "Report", anchor: Series) -> str:
  """Every curve against the anchor, the best BD-rate first; on a phone a card each."""
  columns = [
    ("Curve", "name"), ("Rate from", ""), ("Points", "n"), ("BD-rate", "n"), ("BD-PSNR", "n"),
    ("Common PSNR, dB", "n"), ("Of the curve", "n"), ("BD-rate by MS-SSIM", "n"),
  ]  # fmt: skip
  with_lpips = any(c.rate_by_lpips.value is not None for c in report.comparisons)
  columns += [("BD-rate by LPIPS", "n")] if with_lpips else []
  known = keys(report.series)
  trained = {s.curve.label: training_text(report, s) for s in report.series}
  curve = anchor.curve
  own_range = f"{min(curve.psnr_db):.2f}\u2013{max(curve.psnr_db):.2f}"
  cells = [curve_cell(anchor, known, ["the anchor", trained[curve.label]]), _rate_from(anchor)]
  zeros = ["0", "0"] if with_lpips else ["0"]
  own_row = row(columns, [*cells, str(len(curve.bpp)), "0", "0", own_range, "", *zeros], "anchor")
  rows: list[str] = []
  for c in report.comparisons:
    if own_row not in rows and (c.rate.value is None or c.rate.value >= 0):
      rows.append(own_row)
    curve = c.series.curve
    overlap, share = "\u2013", ""
    if c.rate.overlap is not None:
      overlap = f"{c.rate.overlap[0]:.2f}\u2013{c.rate.overlap[1]:.2f}"
      share = f"{100 * c.rate.share:.0f} %"
    remarks = [c.rate.remark, c.psnr.remark if c.psnr.value is None else ""]
    cells = [
      curve_cell(c.series, known, [trained[c.series.curve.label], *remarks]),
      _rate_from(c.series),
      str(len(curve.bpp)),
      _delta_cell(c.rate, "%", 1, strong=True),
      _delta_cell(c.psnr, "dB", 2),
      overlap,
      share,
      _delta_cell(c.rate_by_msssim, "%", 1),
      *([_delta_cell(c.rate_by_lpips, "%", 1)] if with_lpips else []),
    ]
    rows.append(row(columns, cells, "published" if c.series.published else ""))
  rows += [own_row] if own_row not in rows else []
  return table(columns, rows, "cards")


def _rate_from(series: Series) -> str:
  if series.publication is None:
    return _MODE_NAMES[series.curve.source]
  rate = series.publication.rate
  return "publication" if rate == "not stated" else f"publication, {rate}"


def _delta_cell(delta: bd.Delta, unit: str, digits: int, strong: bool = False) -> str:
  if delta.value is None:
    return f'<span title="{escape(delta.remark)}">\u2013</span>'
  text = f"{bd.signed(delta.value, digits)} {unit}"
  return f'<span class="strong">{text}</span>' if strong else text


def runs(report: "Report") -> str:
  """Every run's means, curve by curve."""
  shown = report.loaded.results
  with_lpips = any(r.mean("lpips") is not None for r in shown)
  with_estimate = any(r.mean("bpp_estimated") is not None for r in shown)
  columns = [("Run", "name"), ("wid", "n"), ("Step", "n"), ("Rate, bpp", "n")]
  columns += [("estimated", "n"), ("overhead", "n")] if with_estimate else []
  columns += [("PSNR, dB", "n"), ("MS-SSIM", "n"), ("in dB", "n")]
  columns += [("LPIPS", "n")] if with_lpips else []
  with_training = any(report.training(r) is not None for r in shown)
  columns += [("Trained, min", "n")] if with_training else []
  columns += [("Encode, ms", "n"), ("Decode, ms", "n"), ("Commit", "")]
  columns += [("State", "")] if report.statuses else []
  rows = []
  known = keys(report.series)
  for s in report.series:
    members = report.members(s)
    if members:
      label = curve_cell(s, known, [training_text(report, s)])
      cell = f'<td colspan="{len(columns)}">{label}</td>'
      rows.append(f'<tr class="group">{cell}</tr>')
    for r in members:
      psnr, msssim = r.mean("psnr_db"), r.mean("msssim")
      is_old = report.is_superseded(r)
      cells = [
        escape(r.run["runname"]) + (" (earlier step)" if is_old else ""),
        escape(r.run["wid"]),
        f"{r.step:,}",
        number(r.mean("bpp"), 4),
      ]
      if with_estimate:
        cells += [number(r.mean("bpp_estimated"), 4), _overhead(r)]
      cells += [
        "lossless" if psnr is None else number(psnr, 3),
        number(msssim, 5),
        number(None if msssim is None else results.msssim_to_db(msssim), 2),
      ]
      cells += [number(r.mean("lpips"), 4)] if with_lpips else []
      if with_training:
        training = report.training(r)
        cells.append(number(training.minutes if training else None, 1))
      for seconds in (r.mean("seconds_encode"), r.mean("seconds_decode")):
        cells.append(number(None if seconds is None else 1000 * seconds, 1))
      commit = str(r.run.get("commit") or "")[:7] or "\u2013"
      cells.append(f"<code>{escape(commit)}{'+' if r.run.get('dirty') else ''}</code>")
      cells += [escape(report.state(r))] if report.statuses else []
      rows.append(row(columns, cells, "old" if is_old else ""))
  return table(columns, rows, "runs")


def _overhead(result: results.ResultFile) -> str:
  """What the files have over the estimate: per cent, and bytes a picture."""
  if result.mode == "estimated":
    return "\u2013"
  pairs = [
    (r.num_bytes, r.bpp_estimated * r.num_pixels / 8)
    for r in result.records
    if r.num_bytes is not None and r.bpp_estimated is not None
  ]
  estimated = sum(e for _, e in pairs)
  if not pairs or estimated <= 0:
    return "\u2013"
  extra = sum(b for b, _ in pairs) - estimated
  return f"{bd.signed(100 * extra / estimated, 2)} % ({bd.signed(extra / len(pairs), 0)} B)"


def training_text(report: "Report", series: Series) -> str:
  """The model's size and what its training took, where that is known."""
  found = {}
  for r in report.members(series):
    training = report.training(r)
    if training is not None and not report.is_superseded(r):
      found[report_data.trained_run(r.run)] = training
  if not found:
    return ""
  sizes = sorted({t.parameters for t in found.values() if t.parameters is not None})
  text = f"{_span([f'{s:,}' for s in sizes])} parameters, " if sizes else ""
  steps = [t.steps for t in found.values()]
  text += f"{len(found)} trained runs of " if len(found) > 1 else "trained for "
  text += _span([f"{s:,}" for s in sorted(steps)]) + " steps"
  minutes = sorted(t.minutes for t in found.values() if t.minutes is not None)
  if minutes:
    each = " each" if len(found) > 1 else ""
    text += f", {_span([f'{m:,.{1 if m < 10 else 0}f}' for m in minutes])} min{each}"
  machines = sorted({t.machine for t in found.values() if t.machine})
  if machines and len(report.machines()) > 1:
    text += f" on {' and '.join(machines)}"
  return "; ".join([text, *_optimisation(report, series)])


def _optimisation(report: "Report", series: Series) -> list[str]:
  """How long the latents of each picture were optimised, if they were."""
  said: dict[str, None] = {}
  for r in report.members(series):
    method = (r.config.get("itinf_config") or {}).get("method")
    if r.mode == "itinf" and method is not None:
      steps = r.config["train_eval_config"]["num_steps"]
      said[f"then {steps:,} steps of {method} for each picture"] = None
  return list(said)


def _span(ordered: Sequence[str]) -> str:
  return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]}\u2013{ordered[-1]}"


def costs(report: "Report") -> str:
  """What decoding costs, cheapest first; what is not known is said."""
  devices = {d for c in report.costs for d in c.devices}
  columns = [
    ("Curve", "name"), ("FLOPs per pixel", "n"), ("Seconds per megapixel", "n"), ("BD-rate", "n"),
  ]  # fmt: skip
  columns += [("Timed on", "remark")] if len(devices) > 1 else []
  known = keys(report.series)

  def order(c: Cost) -> tuple[float, float]:
    return (c.flops.middle if c.flops else math.inf, c.seconds.middle if c.seconds else math.inf)

  rows = []
  for c in sorted(report.costs, key=order):
    if c.flops is None and c.seconds is None and c.series.published:
      continue
    cells = [
      curve_cell(c.series, known),
      _spread(c.flops, FLOPS),
      _spread(c.seconds, SECONDS) if c.seconds or c.series.published else "not decoded",
      "0" if c.series is report.anchor else _delta_cell(c.rate, "%", 1),
    ]
    cells += [escape("; ".join(c.devices))] if len(devices) > 1 else []
    rows.append(row(columns, cells, "published" if c.series.published else ""))
  return table(columns, rows, "cards")


def _spread(spread: Optional[Range], axis: CostAxis) -> str:
  if spread is None:
    return "\u2013"
  text = escape(axis.text(spread.middle))
  if axis.text(spread.low) != axis.text(spread.high):
    text += f"<small>{escape(axis.text(spread.low))}\u2013{escape(axis.text(spread.high))}</small>"
  return text


def matrix(report: "Report", of_rate: bool) -> str:
  """Every curve (row) against every anchor (column): the delta, and below it the overlap."""
  found = report.matrix
  if found is None:
    return ""
  known = keys(report.series)
  heads = "".join(
    f'<th scope="col" title="{escape(s.curve.label)}">{code(known[s.curve.label])}</th>'
    for s in found.series
  )
  rows = []
  for s, deltas in zip(found.series, found.rates if of_rate else found.psnrs):
    cells = "".join(_matrix_cell(d, of_rate) for d in deltas)
    label = s.curve.label
    name = (
      f'<th scope="row" title="{escape(label)}"><span>{swatch(s)}'
      f'<b class="code">{code(known[label])}</b><i>{escape(label)}</i></span></th>'
    )
    rows.append(f"<tr>{name}{cells}</tr>")
  body = "\n".join(rows)
  return (
    f'<div class="scroll"><table class="matrix"><thead><tr><th scope="col">Curve \\ anchor</th>'
    f"{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
  )


def _matrix_cell(delta: Optional[bd.Delta], of_rate: bool) -> str:
  if delta is None:
    return "<td>\u00b7</td>"
  if delta.value is None:
    short = "no overlap" if delta.remark.startswith("no common") else "too few points"
    return f'<td class="no" title="{escape(delta.remark)}">\u2013<small>{short}</small></td>'
  low, high = delta.overlap or (0.0, 0.0)
  digits = (1, 0) if of_rate else (2, 2)
  better = delta.value < 0 if of_rate else delta.value > 0
  kind = "better" if better else "worse"
  kind += " short" if "short overlap" in delta.remark else ""
  title = f' title="{escape(delta.remark)}"' if delta.remark else ""
  return (
    f'<td class="{kind}"{title}>{bd.signed(delta.value, digits[0])}'
    f"<small>{low:.{digits[1]}f}\u2013{high:.{digits[1]}f}</small></td>"
  )
