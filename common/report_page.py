"""The report's plots and page: what `common.report` has read and compared, drawn.

The page is one HTML file that loads nothing from elsewhere. Its plots are matplotlib's SVG,
coloured by CSS variables so that they follow the reader's light or dark theme.
"""

import dataclasses
import datetime
import html
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional
from xml.etree import ElementTree

import configs
from common import bd, results, runs
from common.bd import Metric, Series

if TYPE_CHECKING:
  from common.report import Report

_MODE_NAMES = {
  "bitstream": "files",
  "estimated": "estimate",
  "itinf": "files, optimised latents",
  "vbq": "files, VBQ",
}


# --- Plots ---------------------------------------------------------------------------------------

# Told apart by people with any kind of colour vision, each with 3:1 contrast to the paper.
# (light, dark), of Okabe and Ito 2008 and Paul Tol's sets.
_PALETTE = (
  ("#0072b2", "#56b4e9"),
  ("#d55e00", "#ff8f52"),
  ("#009e73", "#3fd0a2"),
  ("#aa3377", "#ec86bd"),
  ("#8a6d00", "#e3bf3e"),
  ("#4b3fa7", "#aaa0f5"),
)
_COLORS = {  # name: (light, dark)
  "paper": ("#ffffff", "#14171a"),
  "ink": ("#1b1f24", "#e8eaed"),
  "muted": ("#5d6672", "#9aa3ad"),
  "line": ("#dfe3e8", "#2e343b"),
  "grey": ("#98a1ab", "#737c86"),
  **{f"s{i}": pair for i, pair in enumerate(_PALETTE)},
}
_DASHES = {
  "estimated": (5, 2),
  "itinf": (1.2, 1.6),
  "vbq": (7, 2, 1.2, 2),
  "estimate": (5, 2),
  "not stated": (1.6, 1.4),
}
# With six colours, eleven markers make 66 pairs before one comes again.
_MARKERS = "osD^vPX<>p*"
# Published curves of more points than this are lines without dots.
_DOTS = 20


def _color(series: Series) -> str:
  if series.published:
    return "grey"
  return "ink" if series.color < 0 else f"s{series.color % len(_PALETTE)}"


def _marker(series: Series) -> str:
  return _MARKERS[(series.color + 1) % len(_MARKERS)]


def _dashes(series: Series) -> tuple[float, ...]:
  """The line's dashes, empty for a whole line: files or coded streams."""
  rate = series.publication.rate if series.publication else series.curve.source
  return _DASHES.get(rate, ())


def _is_filled(series: Series) -> bool:
  return series.curve.source in ("bitstream", "published")


def _look(series: Series) -> dict[str, Any]:
  """A series in matplotlib's terms."""
  color = _COLORS[_color(series)][0]
  dashes = _dashes(series)
  return {
    "color": color,
    "linestyle": (0, dashes) if dashes else "-",
    "linewidth": 1.1 if series.published else 1.8,
    "marker": "." if series.published else _marker(series),
    "markersize": 3.5 if series.published else 5.5,
    "markerfacecolor": color if _is_filled(series) else _COLORS["paper"][0],
    "markeredgecolor": color,
    "markeredgewidth": 1.2,
  }


@dataclasses.dataclass(frozen=True)
class Plot:
  """A drawn plot.

  Attributes:
    metric: What is drawn against the rate.
    inline: SVG without a legend, coloured by the page's CSS variables.
    svg: SVG file with a legend.
    png: PNG file with a legend.
  """

  metric: Metric
  inline: str
  svg: str
  png: bytes


def draw(
  series: Sequence[Series],
  metric: Metric,
  titles: Mapping[tuple[str, float], str],
  heading: str,
) -> Optional[Plot]:
  """Draws a metric against bits per pixel.

  Args:
    series: All curves; those without the metric are left out.
    metric: What to draw.
    titles: (label, bpp) -> the name of the run at that point, shown on hovering.
    heading: Stands above the plot in the files.

  Returns:
    The plot, or None where no curve measured here (or, lacking those, published) has the metric.
  """
  drawn = [(s, _finite(s.curve, metric)) for s in series]
  drawn = [(s, points) for s, points in drawn if points]
  own = [(s, points) for s, points in drawn if not s.published] or drawn
  if not own:
    return None
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  light = {name: pair[0] for name, pair in _COLORS.items()}
  style = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "text.color": light["ink"],
    "axes.labelcolor": light["ink"],
    "axes.edgecolor": light["muted"],
    "xtick.color": light["muted"],
    "ytick.color": light["muted"],
    "xtick.labelcolor": light["ink"],
    "ytick.labelcolor": light["ink"],
  }
  with matplotlib.rc_context(style):
    figure = Figure(figsize=(5.8, 4.5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x_high, y_low, y_high = _limits(own, metric)
    axes.set_xlim(0, x_high)
    axes.set_ylim(y_low, y_high)
    tips: dict[str, list[str]] = {}
    lines: list[tuple[int, list[tuple[float, float]]]] = []
    numbers = _published_numbers(series)
    for place, (s, points) in enumerate(drawn):
      look, order = _look(s), 2 if s.published else 3
      index = f"p{numbers[s.curve.label]}" if s.published else str(place)
      tips[f"line-{index}"] = [s.curve.label]
      line = _line(s.curve, metric, points)
      lines.append((numbers.get(s.curve.label, 0), line))
      axes.plot(*zip(*line), zorder=order, gid=f"line-{index}", **{**look, "marker": ""})
      inside = [p for p in points if p[0] <= x_high and y_low <= p[1] <= y_high]
      if not inside or (s.published and len(inside) > _DOTS):
        continue
      axes.plot(
        *zip(*inside), zorder=order + 0.5, gid=f"dots-{index}", **{**look, "linestyle": "none"}
      )
      tips[f"dots-{index}"] = [_tip(s, metric, p, titles) for p in inside]
    _write_numbers(axes, lines)
    axes.set_xlabel("Rate (bits per pixel)")
    axes.set_ylabel(metric.axis)
    axes.grid(True, color=light["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)
    figure.subplots_adjust(left=0.13, right=0.985, bottom=0.135, top=0.975)
    inline = io.StringIO()
    figure.savefig(inline, format="svg", transparent=True, metadata={"Date": None})
    _add_legend(axes, [s for s, _ in drawn], numbers)
    axes.set_title(heading, loc="left", fontsize=12)
    svg, png = io.StringIO(), io.BytesIO()
    box: dict[str, Any] = {
      "bbox_inches": "tight", "pad_inches": 0.12, "facecolor": light["paper"],
    }  # fmt: skip
    figure.savefig(svg, format="svg", metadata={"Date": None}, **box)
    figure.savefig(png, format="png", dpi=150, **box)
  return Plot(metric, _inline(inline.getvalue(), metric, tips), svg.getvalue(), png.getvalue())


def _finite(curve: results.RDCurve, metric: Metric) -> list[tuple[float, float]]:
  values = getattr(curve, metric.field)
  return [(b, v) for b, v in zip(curve.bpp, values or ()) if math.isfinite(v)]


def _line(
  curve: results.RDCurve, metric: Metric, points: list[tuple[float, float]]
) -> list[tuple[float, float]]:
  """What the line joins: the points that are not beaten by others of the curve."""
  if not metric.falls:
    return bd.front(curve, metric) or points
  line: list[tuple[float, float]] = []
  for point in points:
    if not line or point[1] < line[-1][1]:
      line.append(point)
  return line


def _limits(
  own: Sequence[tuple[Series, list[tuple[float, float]]]], metric: Metric
) -> tuple[float, float, float]:
  """x's upper limit, y's limits: what the runs reach; classical curves may leave at the right.

  Of published curves alone: what half of them reach, for codecs go up to 10 bits per pixel.
  """
  runs_only = [points for s, points in own if not s.curve.group.startswith("classical-")]
  x_high = max(b for points in (runs_only or [p for _, p in own]) for b, _ in points)
  if all(s.published for s, _ in own):
    x_high = statistics.median(max(b for b, _ in points) for _, points in own)
  x_high *= 1.25 if runs_only and len(runs_only) < len(own) else 1.04
  shown = [v for _, points in own for b, v in points if b <= x_high]
  low, high = min(shown), max(shown)
  pad = 0.05 * (high - low) or 0.5
  return x_high, max(0.0, low - pad) if metric.falls else low - pad, high + pad


def _write_numbers(axes: Any, lines: Sequence[tuple[int, list[tuple[float, float]]]]) -> None:
  """Numbers on published curves, each where it is nearest to its own curve only.

  Args:
    axes: With its limits set.
    lines: (number, points) of what is drawn, by rate; number 0 gets no text.
  """
  import numpy as np

  (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
  scale = np.array([x_high - x_low, y_high - y_low])
  paths: list[tuple[int, Any]] = []
  for number, points in lines:
    whole = (np.array(points) - (x_low, y_low)) / scale  # Of the axes' width and height.
    steps = np.linspace(0, len(whole) - 1, 40 * len(whole))
    path = np.stack([np.interp(steps, np.arange(len(whole)), column) for column in whole.T], 1)
    paths.append((number, path[(path <= 1).all(1) & (path >= 0).all(1)]))
  placed: list[Any] = []
  for number, path in paths:
    inside = path[((path > 0.02) & (path < 0.98)).all(1)]
    if not number or not len(inside):
      continue
    travelled = np.cumsum(np.r_[0, np.hypot(*np.diff(inside, axis=0).T)])
    spots = inside[np.searchsorted(travelled, np.linspace(0.3, 1, 25) * travelled[-1])]
    others = [p for n, p in paths if n != number and len(p)] + [np.array([q]) for q in placed]
    room = np.full(len(spots), 1.0)
    for other in others:
      room = np.minimum(room, np.hypot(*(spots[:, None] - other[None]).transpose(2, 0, 1)).min(1))
    if placed:  # Texts that overlap cannot be read: worse than any line below.
      apart = np.abs(spots[:, None] - np.array(placed)[None]) / (0.045, 0.05)
      room = np.where((apart.max(2) < 1).any(1), room - 1, room)
    spot = spots[len(spots) - 1 - int(np.argmax(room[::-1]))]
    placed.append(spot)
    text = axes.text(
      *(spot * scale + (x_low, y_low)), str(number), fontsize=8.5, ha="center", va="center",
      color=_COLORS["muted"][0], zorder=2.8, gid=f"end-p{number}",
    )  # fmt: skip
    text.set_bbox({"facecolor": _COLORS["paper"][0], "edgecolor": "none", "pad": 0.7})


def _published_numbers(series: Iterable[Series]) -> dict[str, int]:
  return {s.curve.label: i for i, s in enumerate((s for s in series if s.published), 1)}


def _name(series: Series, numbers: Mapping[str, int]) -> str:
  label = series.curve.label
  return f"{numbers[label]}  {label}" if label in numbers else label


def _add_legend(axes: Any, series: Sequence[Series], numbers: Mapping[str, int]) -> None:
  from matplotlib.lines import Line2D

  axes.legend(
    handles=[Line2D([], [], label=_name(s, numbers), **_look(s)) for s in series],
    loc="upper left",
    bbox_to_anchor=(1.02, 1.0),
    borderaxespad=0,
    frameon=False,
    fontsize=9,
    handlelength=2.6,
  )


def _tip(
  series: Series,
  metric: Metric,
  point: tuple[float, float],
  titles: Mapping[tuple[str, float], str],
) -> str:
  run = titles.get((series.curve.label, point[0]))
  where = f"{series.curve.label}, {run}" if run else series.curve.label
  return f"{where}\n{point[0]:.4f} bpp, {metric.name} {point[1]:.3f} {metric.unit}".strip()


def _inline(svg: str, metric: Metric, tips: Mapping[str, Sequence[str]]) -> str:
  """A matplotlib SVG as part of the page: themed, described, with a tip on every line and dot.

  What belongs to the published curve of number 3 has the class `p3`, for the page's legend.
  """
  ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
  ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
  space = "{http://www.w3.org/2000/svg}"
  root = ElementTree.fromstring(svg)
  for metadata in root.findall(f"{space}metadata"):
    root.remove(metadata)
  for group in root.iter(f"{space}g"):
    kind, _, index = group.get("id", "").partition("-")
    if kind in ("line", "dots", "end") and index.startswith("p"):
      group.set("class", f"{index} {kind}")
    texts = tips.get(group.get("id", ""), [])
    marks = list(group.iter(f"{space}{'use' if kind == 'dots' else 'path'}"))
    if len(texts) == len(marks):
      for mark, text in zip(marks, texts):
        ElementTree.SubElement(mark, f"{space}title").text = text
  root.attrib.pop("width", None)
  root.attrib.pop("height", None)
  root.set("role", "img")
  root.set("aria-label", f"{metric.name} against bits per pixel; the numbers are in the tables.")
  text = ElementTree.tostring(root, encoding="unicode")
  text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{metric.file}-", text)
  for name, (light, _) in _COLORS.items():
    text = text.replace(light, f"var(--{name})")
  return text


# --- Tables -------------------------------------------------------------------------------------


def _number(value: Optional[float], digits: int) -> str:
  return "\u2013" if value is None else f"{value:.{digits}f}".replace("-", "\u2212")


_STYLE = """
:root{--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:75rem;padding:2rem clamp(1rem,4vw,2.75rem) 4rem;
background:var(--paper);color:var(--ink);font:1rem/1.55 var(--sans)}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .35rem;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.2rem;line-height:1.3;margin:3rem 0 .5rem;letter-spacing:-.005em}
h3{font-size:.95rem;margin:1.5rem 0 .25rem}
figure h3{margin-top:0}
p,ul{margin:.5rem 0;max-width:48rem}
.meta,.note{max-width:none}
ul{padding-left:1.2rem}
li{margin:.25rem 0}
.meta,.note,figcaption{color:var(--muted);font-size:.875rem}
.notice{border-left:3px solid var(--s1);padding:.1rem 0 .1rem .9rem;margin:1.5rem 0}
.plots{display:grid;gap:1.5rem 2rem;margin-top:1rem}
@media(min-width:56rem){.plots{grid-template-columns:1fr 1fr}}
figure{margin:0;min-width:0}
.plot svg{display:block;width:100%;height:auto}
.plot svg text{font-family:var(--sans)!important}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;list-style:none;padding:0;margin:1rem 0 0;
max-width:none;font-size:.9rem}
.legend li{margin:0;display:flex;gap:.5rem;align-items:center}
.legend svg,td svg{flex:none;vertical-align:-.1em}
.legend.published{color:var(--muted);font-size:.8rem;gap:.2rem 1.1rem;margin-top:.5rem}
.legend .source{font-weight:600}
.legend label{display:flex;gap:.4rem;align-items:center;cursor:pointer}
.legend input{width:.8rem;height:.8rem;margin:0;accent-color:var(--grey)}
.scroll{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-size:.875rem;line-height:1.4;font-variant-numeric:tabular-nums;
width:100%}
th,td{padding:.4rem .8rem .4rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}
th:last-child,td:last-child{padding-right:0}
thead th{font-weight:600;color:var(--muted);vertical-align:bottom}
.n{text-align:right}
td.n{white-space:nowrap}
.name{min-width:13rem}
.curve{display:flex;gap:.55rem}
.curve svg{margin-top:.22rem}
small{display:block;color:var(--muted);font-size:.8rem}
td.remark{min-width:12rem;color:var(--muted)}
tr.group td{font-weight:600;padding-top:1.1rem;white-space:nowrap}
tr.old td,tr.published td{color:var(--muted)}
.strong{font-weight:600}
code{font:.85em ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere}
footer{margin-top:3.5rem;padding-top:1rem;border-top:1px solid var(--line)}
details summary{cursor:pointer}
h4{font-size:.875rem;margin:1.2rem 0 .2rem;color:var(--ink)}
.curves{list-style:none;padding:0;display:grid;gap:.35rem 1.5rem;max-width:none;
grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr))}
.curves li{margin:0}
@media print{body{max-width:none}.scroll{overflow:visible}}
"""


def _theme() -> str:
  def variables(index: int) -> str:
    return "".join(f"--{name}:{pair[index]};" for name, pair in _COLORS.items())

  return (
    f":root{{color-scheme:light dark;{variables(0)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{variables(1)}}}}}"
  )


_MARKER_PATHS = {
  "o": '<circle cx="15" cy="6" r="3.6"/>',
  "s": '<path d="M11.6 2.6h6.8v6.8h-6.8z"/>',
  "D": '<path d="M15 1.2l4.8 4.8-4.8 4.8-4.8-4.8z"/>',
  "^": '<path d="M15 2l4 7.2h-8z"/>',
  "v": '<path d="M15 10l4-7.2h-8z"/>',
  "P": '<path d="M13.6 2h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z"/>',
  "X": '<path d="M12 1.6l3 2.6 3-2.6 1.6 1.6-2.8 2.8 2.8 2.8-1.6 1.6-3-2.6-3 2.6-1.6-1.6 2.8-2.8'
  '-2.8-2.8z"/>',
  "<": '<path d="M11 6l7.2-4v8z"/>',
  ">": '<path d="M19 6l-7.2-4v8z"/>',
  "p": '<path d="M15 2l4.2 3-1.6 4.8h-5.2l-1.6-4.8z"/>',
  "*": '<path d="M15 1l1.4 3.4 3.6.3-2.7 2.4.8 3.6-3.1-1.9-3.1 1.9.8-3.6-2.7-2.4 3.6-.3z"/>',
}


def _swatch(series: Series) -> str:
  color = f"var(--{_color(series)})"
  fill = color if _is_filled(series) else "var(--paper)"
  dashes = " ".join(map(str, _dashes(series)))
  pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
  mark = '<circle cx="15" cy="6" r="1.6"/>' if series.published else _MARKER_PATHS[_marker(series)]
  return (
    '<svg width="30" height="12" viewBox="0 0 30 12" aria-hidden="true">'
    f'<path d="M0 6h30" fill="none" stroke="{color}" '
    f'stroke-width="{1.2 if series.published else 2}"{pattern}/>'
    f'<g fill="{fill}" stroke="{color}" stroke-width="1.2">{mark}</g>'
    "</svg>"
  )


def _escape(text: Any) -> str:
  return html.escape(str(text))


def _table(columns: Sequence[tuple[str, str]], rows: Iterable[str]) -> str:
  head = "".join(f'<th class="{kind}" scope="col">{_escape(name)}</th>' for name, kind in columns)
  body = "\n".join(rows)
  return (
    f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
    f"<tbody>\n{body}\n</tbody></table></div>"
  )


def _row(columns: Sequence[tuple[str, str]], cells: Sequence[str], kind: str = "") -> str:
  inside = "".join(f'<td class="{c[1]}">{cell}</td>' for c, cell in zip(columns, cells))
  return f'<tr class="{kind}">{inside}</tr>' if kind else f"<tr>{inside}</tr>"


def _legends(series: Sequence[Series]) -> tuple[str, str]:
  """Of own curves; of published ones by source, each with a switch that needs no script."""
  own = [
    f"<li>{_swatch(s)}<span>{_escape(s.curve.label)}</span></li>" for s in series if not s.published
  ]
  sources: dict[str, list[str]] = {}
  for number, (s, publication) in enumerate(_published(series), 1):
    sources.setdefault(publication.source, []).append(
      f'<li><label class="p{number}"><input type="checkbox" checked/>{_swatch(s)}'
      f"<span>{number}&ensp;{_escape(publication.title)}</span></label></li>"
    )
  lists = [
    f'<ul class="legend published"><li class="source">{_escape(source)}</li>{"".join(items)}</ul>'
    for source, items in sources.items()
  ]
  return (f'<ul class="legend">{"".join(own)}</ul>' if own else "", "".join(lists))


def _published(series: Iterable[Series]) -> list[tuple[Series, results.Publication]]:
  return [(s, s.publication) for s in series if s.publication is not None]


def _switches(series: Iterable[Series]) -> str:
  """Styles of published curves: hidden by their switch, dark where one points at them."""
  rules = []
  for number in range(1, 1 + len(_published(series))):
    of = f"section:has(label.p{number}"
    seen = f":is({of}:hover,label.p{number} :focus-visible) g.p{number},g.p{number}:hover)"
    rules.append(
      f"{of} input:not(:checked)) g.p{number}{{display:none}}"
      f"{seen}:not(.end) :is(path,use){{stroke:var(--ink)!important}}"
      f"{seen}.line path{{stroke-width:2.4!important}}"
      f"{seen} text{{fill:var(--ink)!important}}"
    )
  return "".join(rules)


def _curve_cell(series: Series, numbers: Mapping[str, int], remarks: Iterable[str] = ()) -> str:
  said = "; ".join(dict.fromkeys(r for r in remarks if r))
  small = f"<small>{_escape(said)}</small>" if said else ""
  name = f"<span>{_escape(_name(series, numbers))}{small}</span>"
  return f'<div class="curve">{_swatch(series)}{name}</div>'


def _comparison_table(report: "Report", anchor: Series) -> str:
  columns = [
    ("Curve", "name"), ("Rate from", ""), ("Points", "n"), ("BD-rate", "n"), ("BD-PSNR", "n"),
    ("Common PSNR, dB", "n"), ("of curve", "n"), ("BD-rate by MS-SSIM", "n"),
  ]  # fmt: skip
  with_lpips = any(c.rate_by_lpips.value is not None for c in report.comparisons)
  columns += [("BD-rate by LPIPS", "n")] if with_lpips else []
  numbers = _published_numbers(report.series)
  curve = anchor.curve
  own_range = f"{min(curve.psnr_db):.2f}\u2013{max(curve.psnr_db):.2f}"
  cells = [_curve_cell(anchor, numbers, ["the anchor"]), _rate_from(anchor)]
  zeros = ["0", "0"] if with_lpips else ["0"]
  rows = [_row(columns, [*cells, str(len(curve.bpp)), "0", "0", own_range, "", *zeros])]
  for c in report.comparisons:
    curve = c.series.curve
    overlap, share = "\u2013", ""
    if c.rate.overlap is not None:
      overlap = f"{c.rate.overlap[0]:.2f}\u2013{c.rate.overlap[1]:.2f}"
      share = f"{100 * c.rate.share:.0f} %"
    remarks = [c.rate.remark, c.psnr.remark if c.psnr.value is None else ""]
    cells = [
      _curve_cell(c.series, numbers, remarks),
      _rate_from(c.series),
      str(len(curve.bpp)),
      _delta_cell(c.rate, "%", 1, strong=True),
      _delta_cell(c.psnr, "dB", 2),
      overlap,
      share,
      _delta_cell(c.rate_by_msssim, "%", 1),
      *([_delta_cell(c.rate_by_lpips, "%", 1)] if with_lpips else []),
    ]
    rows.append(_row(columns, cells, "published" if c.series.published else ""))
  return _table(columns, rows)


def _rate_from(series: Series) -> str:
  if series.publication is None:
    return _MODE_NAMES[series.curve.source]
  rate = series.publication.rate
  return "publication" if rate == "not stated" else f"publication, {rate}"


def _delta_cell(delta: bd.Delta, unit: str, digits: int, strong: bool = False) -> str:
  if delta.value is None:
    return f'<span title="{_escape(delta.remark)}">\u2013</span>'
  text = f"{bd.signed(delta.value, digits)} {unit}"
  return f'<span class="strong">{text}</span>' if strong else text


def _runs_table(report: "Report") -> str:
  shown = report.loaded.results
  with_lpips = any(r.mean("lpips") is not None for r in shown)
  with_estimate = any(r.mean("bpp_estimated") is not None for r in shown)
  columns = [("Run", "name"), ("wid", "n"), ("Step", "n"), ("Rate, bpp", "n")]
  columns += [("estimated", "n"), ("overhead", "n")] if with_estimate else []
  columns += [("PSNR, dB", "n"), ("MS-SSIM", "n"), ("in dB", "n")]
  columns += [("LPIPS", "n")] if with_lpips else []
  columns += [("Encode, ms", "n"), ("Decode, ms", "n"), ("Commit", "")]
  columns += [("State", "")] if report.statuses else []
  rows = []
  for s in report.series:
    members = report.members(s)
    if members:
      cell = f'<td colspan="{len(columns)}">{_curve_cell(s, {})}</td>'
      rows.append(f'<tr class="group">{cell}</tr>')
    for r in members:
      psnr, msssim = r.mean("psnr_db"), r.mean("msssim")
      is_old = report.is_superseded(r)
      cells = [
        _escape(r.run["runname"]) + (" (earlier step)" if is_old else ""),
        _escape(r.run["wid"]),
        f"{r.step:,}",
        _number(r.mean("bpp"), 4),
      ]
      if with_estimate:
        cells += [_number(r.mean("bpp_estimated"), 4), _overhead(r)]
      cells += [
        "lossless" if psnr is None else _number(psnr, 3),
        _number(msssim, 5),
        _number(None if msssim is None else results.msssim_to_db(msssim), 2),
      ]
      cells += [_number(r.mean("lpips"), 4)] if with_lpips else []
      for seconds in (r.mean("seconds_encode"), r.mean("seconds_decode")):
        cells.append(_number(None if seconds is None else 1000 * seconds, 1))
      commit = str(r.run.get("commit") or "")[:7] or "\u2013"
      cells.append(f"<code>{_escape(commit)}{'+' if r.run.get('dirty') else ''}</code>")
      cells += [_escape(report.state(r))] if report.statuses else []
      rows.append(_row(columns, cells, "old" if is_old else ""))
  return _table(columns, rows)


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
is the mean difference in PSNR at equal rate. “Of curve” is the share of the curve’s own PSNR range
that the comparison covers. Points that another point of the same curve beats in both rate and
quality do not count.</li>
<li><b>Seconds</b>: wall time a picture on the machine that measured it; compare within one machine
only.</li>
<li><b>Chroma</b>: the subsampling of classical codecs is in their label; all metrics are taken in
RGB.</li>
<li>A “+” after a commit: with changes that were not committed.</li>
</ul>
"""


def page(report: "Report", plots: Sequence[Plot]) -> str:
  """The HTML page; it loads nothing from elsewhere."""
  parts = [
    '<!doctype html><html lang="en"><head><meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width,initial-scale=1">',
    '<meta name="color-scheme" content="light dark">',
    f"<title>{_escape(report.title)}: rate and distortion</title>",
    f"<style>{_theme()}{_STYLE}{_switches(report.series)}</style></head><body>",
    f"<header><h1>{_escape(report.title)}</h1>",
    f'<p class="meta">{_escape(_facts(report))}</p></header>',
    _notices(report),
  ]
  if plots:
    figures = "".join(
      f'<figure class="plot"><h3>{_escape(p.metric.name)}</h3>{p.inline}</figure>' for p in plots
    )
    legend, published_legend = _legends(report.series)
    parts += [
      f'<section aria-label="Plots">{legend}<div class="plots">{figures}</div>{published_legend}',
      f'<p class="note">{_escape(_plot_note(report))}</p></section>',
    ]
  if report.anchor is not None:
    label = _escape(report.anchor.curve.label)
    parts.append(f"<section><h2>Compared with {label}</h2>")
    if report.comparisons:
      own = [c for c in report.comparisons if not c.series.published]
      sentences = "".join(
        f"<li><b>{_escape(c.series.curve.label)}</b>: {_escape(bd.gain_sentence(c.gain))}</li>"
        for c in own
      )
      parts.append(_comparison_table(report, report.anchor))
      if sentences:
        parts.append(f"<h3>PSNR at equal bytes, against {label}</h3><ul>{sentences}</ul>")
    else:
      parts.append("<p>There is no other curve to compare.</p>")
    parts.append("</section>")
  if report.loaded.results:
    parts.append(f"<section><h2>Runs</h2>{_runs_table(report)}</section>")
  parts += [_missing(report), _left_out(report)]
  parts.append(f"<section><h2>How it was measured</h2>{_CONVENTIONS}{_sources(report)}</section>")
  parts.append(
    '<footer class="note">The numbers are beside this page: <code>curves.csv</code>, '
    "<code>bd_rate.csv</code>, <code>records.csv</code> (every picture of every run)"
    f"{_plot_files(plots)}.</footer></body></html>\n"
  )
  return "\n".join(p for p in parts if p)


def _facts(report: "Report") -> str:
  facts = []
  found = report.loaded.results
  if found:
    facts.append(f"{len(found[0].records)} pictures (hash {found[0].dataset['hash'][:12]})")
  facts.append(_count(len(found), "result"))
  facts.append(_count(sum(not s.published for s in report.series), "curve"))
  published = sum(s.published for s in report.series)
  facts += [f"{published} published"] if published else []
  facts.append(datetime.datetime.now().strftime("%Y-%m-%d %H:%M"))
  commit = runs.git_state(configs.PROJECT_DIR)
  if commit["commit"]:
    facts.append(f"commit {commit['commit'][:7]}{'+' if commit['dirty'] else ''}")
  return " · ".join(facts)


def _count(number: int, noun: str) -> str:
  return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _notices(report: "Report") -> str:
  notices = []
  without = report.without_results()
  if without:
    notices.append(f"{_count(len(without), 'run')} of those asked for: no results (listed below).")
  if report.problems:
    notices.append(f"{_count(len(report.problems), 'file')} left out (listed below).")
  if report.loaded.other_pictures:
    notices.append(
      f"{_count(report.loaded.other_pictures, 'result')} measured on other pictures of the same "
      "data set’s name (another hash): left out, for they cannot be compared with these."
    )
  if report.loaded.not_selected:
    count = _count(report.loaded.not_selected, "result")
    notices.append(f"{count} of other runs not shown (--runs).")
  records = [r for result in report.loaded.results for r in result.records]
  lossless = sum(r.mse == 0 for r in records)
  if lossless:
    notices.append(
      f"{_count(lossless, 'record')} without any error: no PSNR, left out of the means."
    )
  fewer = {r.image for r in records if r.msssim_scales is not None and r.msssim_scales < 5}
  if fewer:
    notices.append(f"{_count(len(fewer), 'picture')} too small for five scales of MS-SSIM.")
  if not notices:
    return ""
  return f'<div class="notice">{"".join(f"<p>{_escape(n)}</p>" for n in notices)}</div>'


def _plot_note(report: "Report") -> str:
  own = any(not s.published for s in report.series)
  notes = ["One colour an experiment, one dot a run."] if own else []
  if any(s.curve.source not in ("bitstream", "published") for s in report.series):
    notes.append("Filled: sizes of files; hollow and dashed: other rates (see the labels).")
  if any(s.published for s in report.series):
    notes.append(
      "Grey and numbered: published curves; whole lines are files or coded streams, dashes "
      "estimates, dots not stated. Point at one in the legend to see it, untick it to hide it."
    )
  kinds = {s.curve.group.startswith("classical-") for s in report.series if not s.published}
  if len(kinds) == 2:
    notes.append("The axes end where the runs do; classical codecs go on.")
  return " ".join(notes)


def _plot_files(plots: Sequence[Plot]) -> str:
  names = [f"<code>{p.metric.file}{s}</code>" for p in plots for s in (".svg", ".png")]
  return ", and the plots with a legend: " + ", ".join(names) if names else ""


def _missing(report: "Report") -> str:
  without = report.without_results()
  if not without:
    return ""
  columns = [("Run", "name"), ("State", ""), ("", "remark")]
  rows = [
    _row(
      columns,
      [
        f"<code>{_escape(s.path.parent.name)}/{_escape(s.path.name)}</code>",
        _escape(s.state),
        _escape(s.detail),
      ],
    )
    for s in without
  ]
  return f"<section><h2>Runs without results</h2>{_table(columns, rows)}</section>"


def _left_out(report: "Report") -> str:
  if not report.problems:
    return ""
  columns = [("File", "name"), ("Why", "remark")]
  rows = [
    _row(columns, [f"<code>{_escape(p.path.name)}</code>", _escape(p.reason)])
    for p in report.problems
  ]
  return f"<section><h2>Files left out</h2>{_table(columns, rows)}</section>"


def _sources(report: "Report") -> str:
  """How published curves were measured, and which of them are not drawn."""
  said: dict[str, dict[str, list[str]]] = {}
  for number, (_, p) in enumerate(_published(report.series), 1):
    name = f"<b>{number}</b>&ensp;{_escape(p.title)}"
    name += f"<small><code>{_escape(p.reference)}</code></small>" if p.reference else ""
    said.setdefault(p.source, {}).setdefault(p.convention, []).append(f"<li>{name}</li>")
  items = ""
  for source, conventions in said.items():
    items += f"<h4>{_escape(source)}</h4>"
    for convention, names in conventions.items():
      items += f'<p>{_escape(convention)}</p><ul class="curves">{"".join(names)}</ul>'
  others = ", ".join(
    f"{_escape(p.title)} (<code>{_escape(p.codec)}</code>)" for _, p in _published(report.not_drawn)
  )
  if others:
    items += f"<h4>Not drawn</h4><p>Ask with --published=all, or by name: {others}.</p>"
  if not items:
    return ""
  return f'<details class="note"><summary>Published curves</summary>{items}</details>'
