"""The report's plots, drawn by matplotlib: SVG for the page, SVG and PNG with a legend as files."""

import contextlib
import dataclasses
import io
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional
from xml.etree import ElementTree

from common import bd, results
from common.bd import Metric, Series
from common.report_cost import Cost, Range
from common.report_look import COLORS, code, color, dashes, is_filled, keys, marker

# Published curves of more points than this are lines without dots.
_DOTS = 20


@dataclasses.dataclass(frozen=True)
class Plot:
  """A drawn plot.

  Attributes:
    file: Stem of its files.
    name: For its heading.
    inline: SVG without a legend, coloured by the page's CSS variables.
    svg: SVG file with a legend.
    png: PNG file with a legend.
  """

  file: str
  name: str
  inline: str
  svg: str
  png: bytes


@dataclasses.dataclass(frozen=True)
class CostAxis:
  """What the BD-rate is drawn against.

  Attributes:
    field: Of `report_cost.Cost`.
    file: Stem of the plot's file.
    name: For headings.
    axis: The axis label, with its unit.
    units: (from which value, divisor, suffix) of numbers, the greatest first.
  """

  field: str
  file: str
  name: str
  axis: str
  units: tuple[tuple[float, float, str], ...]

  def text(self, value: float) -> str:
    """A value for people: "41k", "35 ms"."""
    divisor, suffix = next(unit[1:] for unit in self.units if value >= unit[0])
    return f"{value / divisor:.3g}{suffix}"


FLOPS = CostAxis(
  "flops", "cost_flops", "BD-rate against decoding FLOPs", "Decoder, FLOPs per pixel",
  ((1e6, 1e6, "M"), (1e3, 1e3, "k"), (0, 1, "")),
)  # fmt: skip
SECONDS = CostAxis(
  "seconds", "cost_seconds", "BD-rate against decoding time", "Decoding, seconds per megapixel",
  ((1, 1, " s"), (0, 1e-3, " ms")),
)  # fmt: skip
COST_AXES = (FLOPS, SECONDS)
FILES = (*(m.file for m in bd.METRICS), *(a.file for a in COST_AXES))


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
  known = keys(series)
  with _axes() as axes:
    x_high, y_low, y_high = _limits(own, metric)
    axes.set_xlim(0, x_high)
    axes.set_ylim(y_low, y_high)
    tips: dict[str, list[str]] = {}
    lines: list[tuple[int, list[tuple[float, float]]]] = []
    for s, points in drawn:
      look, order, key = _look(s), 2 if s.published else 3, known[s.curve.label]
      tips[f"line-{key}"] = [s.curve.label]
      line = _line(s.curve, metric, points)
      lines.append((int(key[1:]) if s.published else 0, line))
      axes.plot(*zip(*line), zorder=order, gid=f"line-{key}", **{**look, "marker": ""})
      inside = [p for p in points if p[0] <= x_high and y_low <= p[1] <= y_high]
      if not inside or (s.published and len(inside) > _DOTS):
        continue
      axes.plot(
        *zip(*inside), zorder=order + 0.5, gid=f"dots-{key}", **{**look, "linestyle": "none"}
      )
      tips[f"dots-{key}"] = [_tip(s, metric, p, titles) for p in inside]
    _write_numbers(axes, lines)
    axes.set_xlabel("Rate (bits per pixel)")
    axes.set_ylabel(metric.axis)
    named = {s.curve.label: known[s.curve.label] for s, _ in drawn}
    about = f"{metric.name} against bits per pixel; the numbers are in the tables."
    return _finished(
      axes, metric.file, metric.name, about, tips, [s for s, _ in drawn], named, heading
    )


def draw_cost(
  costs: Sequence[Cost], axis: CostAxis, known: Mapping[str, str], heading: str
) -> Optional[Plot]:
  """Draws BD-rates against what decoding costs, one dot a curve.

  Args:
    costs: Those without a BD-rate or this cost are left out.
    axis: Which cost.
    known: Label -> key of all curves.
    heading: Stands above the plot in the files.

  Returns:
    The plot, or None where it would have no dot.
  """
  drawn = cost_points(costs, axis)
  if not drawn:
    return None
  with _axes() as axes:
    _scale(axes, drawn, axis)
    axes.axhline(0, color=COLORS["muted"][0], linewidth=1, zorder=1)
    front = _cost_front([(spread.middle, rate) for _, spread, rate in drawn])
    axes.plot(
      *zip(*front), color=COLORS["grey"][0], linewidth=1, linestyle=(0, (1.2, 2)), zorder=1.5
    )
    tips: dict[str, list[str]] = {}
    for c, spread, rate in drawn:
      s, key = c.series, known[c.series.curve.label]
      look, order = _look(s), 2 if s.published else 3
      if spread.low < spread.high:
        ends = [(spread.low, rate), (spread.high, rate)]
        whole = {**look, "marker": "", "linestyle": "-", "linewidth": 1.1}
        axes.plot(*zip(*ends), zorder=order, gid=f"line-{key}", **whole)
      dot = {**look, "linestyle": "none"}
      dot.update({"marker": "o", "markersize": 5} if s.published else {"markersize": 7.5})
      axes.plot([spread.middle], [rate], zorder=order + 0.5, gid=f"dots-{key}", **dot)
      tips[f"dots-{key}"] = [_cost_tip(c, axis, spread, rate)]
    _write_codes(
      axes, [(known[c.series.curve.label], spread.middle, rate) for c, spread, rate in drawn]
    )
    axes.set_xlabel(axis.axis)
    axes.set_ylabel("BD-rate by PSNR (%)")
    shown = [c.series for c, _, _ in drawn]
    about = f"{axis.name}; the numbers are in the table below."
    return _finished(axes, axis.file, axis.name, about, tips, shown, dict(known), heading)


def cost_points(costs: Sequence[Cost], axis: CostAxis) -> list[tuple[Cost, Range, float]]:
  """What `draw_cost` draws: (the curve's cost, x, BD-rate)."""
  points = [(c, getattr(c, axis.field), c.rate.value) for c in costs]
  known = [(c, x, rate) for c, x, rate in points if x is not None and rate is not None]
  return [(c, x, rate) for c, x, rate in known if rate <= _worst_drawn(costs)]


def why_not(cost: Cost, costs: Sequence[Cost], axis: CostAxis) -> str:
  """Why a curve has no dot in a plot of costs; empty where it has one."""
  remark = getattr(cost, f"{axis.field}_remark")
  if getattr(cost, axis.field) is None:
    return str(remark)
  if cost.rate.value is None:
    return f"no BD-rate: {cost.rate.remark}"
  if cost.rate.value > _worst_drawn(costs):
    return f"BD-rate {bd.signed(cost.rate.value, 1)} %, too far from the others"
  return ""


def _worst_drawn(costs: Sequence[Cost]) -> float:
  """Greater BD-rates, in per cent, would press all other dots together."""
  rates = [abs(c.rate.value) for c in costs if c.rate.value is not None]
  return max(60.0, 3 * statistics.median(rates)) if rates else 60.0


def _cost_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """The dots that no other beats in both cost and rate, cheapest first."""
  front: list[tuple[float, float]] = []
  for point in sorted(points):
    if not front or point[1] < front[-1][1]:
      front.append(point)
  return front


def _scale(axes: Any, drawn: Sequence[tuple[Cost, Range, float]], axis: CostAxis) -> None:
  """Limits that leave room for the codes, and readable ticks on the logarithmic axis."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  low = min(spread.low for _, spread, _ in drawn)
  high = max(spread.high for _, spread, _ in drawn)
  room = max((high / low) ** 0.08, 1.3)
  axes.set_xscale("log")
  axes.set_xlim(low / room, high * room)
  few = math.log10(high / low * room**2) < 2
  axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: axis.text(value)))
  axes.xaxis.set_minor_formatter(NullFormatter())
  rates = [0.0, *(rate for _, _, rate in drawn)]
  pad = 0.09 * (max(rates) - min(rates)) or 5
  axes.set_ylim(min(rates) - pad, max(rates) + pad)


def _cost_tip(cost: Cost, axis: CostAxis, spread: Range, rate: float) -> str:
  text = f"{cost.series.curve.label}\n{axis.axis}: {axis.text(spread.middle)}"
  if spread.low < spread.high:
    text += f" ({axis.text(spread.low)} to {axis.text(spread.high)})"
  text += f"\nBD-rate {bd.signed(rate, 1)} %"
  return f"{text}\n{'; '.join(cost.devices)}" if axis.field == "seconds" else text


@contextlib.contextmanager
def _axes() -> Iterator[Any]:
  """The axes of a new figure, in the report's style while the context lasts."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  light = {name: pair[0] for name, pair in COLORS.items()}
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
    axes.grid(True, color=light["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)
    figure.subplots_adjust(left=0.145, right=0.97, bottom=0.135, top=0.975)
    yield axes


def _finished(
  axes: Any,
  file: str,
  name: str,
  about: str,
  tips: Mapping[str, Sequence[str]],
  series: Sequence[Series],
  known: Mapping[str, str],
  heading: str,
) -> Plot:
  """The drawn axes as a `Plot`; `series` are those of the files' legend."""
  figure = axes.figure
  inline = io.StringIO()
  figure.savefig(inline, format="svg", transparent=True, metadata={"Date": None})
  _add_legend(axes, series, known)
  axes.set_title(heading, loc="left", fontsize=12)
  svg, png = io.StringIO(), io.BytesIO()
  # Laid out once for both files: "tight" would do it for each.
  whole = figure.get_tightbbox(figure.canvas.get_renderer()).padded(0.12)
  box: dict[str, Any] = {"bbox_inches": whole, "facecolor": COLORS["paper"][0]}
  figure.savefig(svg, format="svg", metadata={"Date": None}, **box)
  figure.savefig(png, format="png", dpi=150, pil_kwargs={"compress_level": 3}, **box)
  return Plot(file, name, _inline(inline.getvalue(), file, about, tips), svg.getvalue(),
              png.getvalue())  # fmt: skip


def _look(series: Series) -> dict[str, Any]:
  """A series in matplotlib's terms."""
  paint = COLORS[color(series)][0]
  pattern = dashes(series)
  return {
    "color": paint,
    "linestyle": (0, pattern) if pattern else "-",
    "linewidth": 1.1 if series.published else 1.8,
    "marker": "." if series.published else marker(series),
    "markersize": 3.5 if series.published else 5.5,
    "markerfacecolor": paint if is_filled(series) else COLORS["paper"][0],
    "markeredgecolor": paint,
    "markeredgewidth": 1.2,
  }


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
  """x's upper limit, y's limits: what most curves reach; those far off leave the axes.

  Classical curves may leave at the right where there are runs. Of published curves alone: what half
  of them reach, for codecs go up to 10 bits per pixel.
  """
  runs_only = [points for s, points in own if not s.curve.group.startswith("classical-")]
  ends = [max(b for b, _ in points) for points in (runs_only or [p for _, p in own])]
  middle = statistics.median(ends)
  if all(s.published for s, _ in own):
    x_high = 1.04 * middle
  else:
    room = 1.25 if runs_only and len(runs_only) < len(own) else 1.04
    x_high = min(room * max(ends), 1.6 * middle)
  shown = [[v for b, v in points if b <= x_high] for _, points in own]
  lows, highs = [min(v) for v in shown if v], [max(v) for v in shown if v]
  span = statistics.median(highs) - statistics.median(lows)
  # What is worse than the others by more than half of their range is left out.
  low, high = min(lows), max(highs)
  if metric.falls:
    high = min(high, statistics.median(highs) + span / 2) if span > 0 else high
  else:
    low = max(low, statistics.median(lows) - span / 2) if span > 0 else low
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
      color=COLORS["muted"][0], zorder=2.8, gid=f"end-p{number}",
    )  # fmt: skip
    text.set_bbox({"facecolor": COLORS["paper"][0], "edgecolor": "none", "pad": 0.7})


def _write_codes(axes: Any, dots: Sequence[tuple[str, float, float]]) -> None:
  """The code of each dot beside it, on the side with the most room; (key, x, y) each."""
  import numpy as np

  places = axes.transAxes.inverted().transform(axes.transData.transform([d[1:] for d in dots]))
  taken = [np.array(p) for p in places]
  for (key, *_), place in zip(dots, places):
    # To the right, left, above, below, then the corners, in the axes' width and height.
    sides = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)])
    spots = place + sides * (0.03, 0.042)
    others = np.array([t for t in taken if t is not place])
    apart = np.abs(spots[:, None] - others[None]) / (0.035, 0.045)
    room = np.minimum(apart.max(2).min(1), 1.0)
    room = np.where(((spots > 0.01) & (spots < 0.99)).all(1), room, -1)
    spot = spots[int(np.argmax(room))]
    taken.append(spot)
    axes.text(
      *spot, code(key), transform=axes.transAxes, fontsize=9, ha="center", va="center",
      color=COLORS["muted" if key[0] == "p" else "ink"][0], zorder=4, gid=f"end-{key}",
    )  # fmt: skip


def _add_legend(axes: Any, series: Sequence[Series], known: Mapping[str, str]) -> None:
  from matplotlib.lines import Line2D

  def name(s: Series) -> str:
    return f"{code(known[s.curve.label])}  {s.curve.label}"

  axes.legend(
    handles=[Line2D([], [], label=name(s), **_look(s)) for s in series],
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


def _inline(svg: str, file: str, about: str, tips: Mapping[str, Sequence[str]]) -> str:
  """A matplotlib SVG as part of the page: themed, described, with a tip on every line and dot.

  What belongs to the curve of key p3 has the class `p3`, for the page's legend.
  """
  ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
  ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
  space = "{http://www.w3.org/2000/svg}"
  root = ElementTree.fromstring(svg)
  for metadata in root.findall(f"{space}metadata"):
    root.remove(metadata)
  for group in root.iter(f"{space}g"):
    kind, _, key = group.get("id", "").partition("-")
    if kind in ("line", "dots", "end"):
      group.set("class", f"{key} {kind}")
    texts = tips.get(group.get("id", ""), [])
    marks = list(group.iter(f"{space}{'use' if kind == 'dots' else 'path'}"))
    if len(texts) == len(marks):
      for mark, text in zip(marks, texts):
        ElementTree.SubElement(mark, f"{space}title").text = text
  root.attrib.pop("width", None)
  root.attrib.pop("height", None)
  root.set("role", "img")
  root.set("aria-label", about)
  text = ElementTree.tostring(root, encoding="unicode")
  text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{file}-", text)
  for name, (light, _) in COLORS.items():
    text = text.replace(light, f"var(--{name})")
  return text
