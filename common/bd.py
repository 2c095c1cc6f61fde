"""Curves against one another: Bjontegaard deltas, and where a curve beats an anchor."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional

from common import results

# Under this many points a BD-rate rests on few measurements; the usual recommendation is four.
_FEW_POINTS = 4

# Under this share of a curve's own range a BD-rate speaks for a corner of the curve only.
_SHORT_OVERLAP = 0.5


class AnchorError(ValueError):
  """No curve is called that; the message lists those there are."""


@dataclasses.dataclass(frozen=True)
class Metric:
  """A quality measure of the plots.

  Attributes:
    field: Of `results.RDCurve`.
    file: Stem of the plot's file.
    name: For headings.
    axis: The axis label, with its unit.
    unit: For overlaps and remarks.
    falls: Whether less is better; Bjontegaard deltas are then over -10 log10 of it.
  """

  field: str
  file: str
  name: str
  axis: str
  unit: str
  falls: bool = False


PSNR = Metric("psnr_db", "rd_psnr", "PSNR", "PSNR (dB)", "dB")
MSSSIM = Metric("msssim_db", "rd_msssim", "MS-SSIM", "MS-SSIM (dB)", "dB")
LPIPS = Metric("lpips", "rd_lpips", "LPIPS", "LPIPS (lower is better)", "", falls=True)
MSE = Metric("mse", "rd_mse", "MSE", "MSE, 0..255 (lower is better)", "", falls=True)
METRICS = (PSNR, MSSSIM, LPIPS, MSE)


@dataclasses.dataclass(frozen=True)
class Delta:
  """A Bjontegaard delta, or the reason why there is none.

  Attributes:
    value: Per cent of rate, or dB; None where it was refused.
    overlap: The interval that it is the mean over: of quality for a BD-rate (dB), of rate for a
      BD-PSNR (bpp).
    share: Overlap / the tested curve's own range, 0..1; for a BD-PSNR of log rate.
    remark: The reason of a refusal, or what to keep in mind.
  """

  value: Optional[float]
  overlap: Optional[tuple[float, float]] = None
  share: float = 0.0
  remark: str = ""


def front(curve: results.RDCurve, metric: Metric = PSNR) -> list[tuple[float, float]]:
  """The (bpp, quality) points of a curve that no other point of it beats, by rate.

  Quality rises strictly from point to point, so interpolation works both ways.
  """
  values = getattr(curve, metric.field)
  if values is None:
    return []
  if metric.falls:
    values = [-10 * math.log10(v) if v > 0 else math.nan for v in values]
  points: list[tuple[float, float]] = []
  for bpp, quality in sorted(zip(curve.bpp, values), key=lambda p: (p[0], -p[1])):
    known = bpp > 0 and math.isfinite(bpp) and math.isfinite(quality)
    if known and (not points or quality > points[-1][1]):
      points.append((bpp, quality))
  return points


def bd_rate(anchor: results.RDCurve, curve: results.RDCurve, metric: Metric = PSNR) -> Delta:
  """Mean difference of the rate at equal quality in per cent; negative: fewer bits than the anchor.

  By PCHIP through the log rates, over the quality that both curves reach (package `bjontegaard`;
  Bjontegaard 2001, VCEG-M33; Herglotz et al. 2022 on the interpolation). Refused, with the reason
  in `remark`, where a curve has fewer than two points or there is no common quality.
  """
  return _delta(anchor, curve, metric, of_rate=True)


def bd_psnr(anchor: results.RDCurve, curve: results.RDCurve, metric: Metric = PSNR) -> Delta:
  """Mean difference of the quality at equal rate, in dB, over the common rates; see `bd_rate`."""
  return _delta(anchor, curve, metric, of_rate=False)


def _delta(anchor: results.RDCurve, curve: results.RDCurve, metric: Metric, of_rate: bool) -> Delta:
  pairs = (front(anchor, metric), front(curve, metric))
  names = ("the anchor", "the curve")
  for name, points, whole in zip(names, pairs, (anchor, curve)):
    if getattr(whole, metric.field) is None:
      return Delta(None, remark=f"{name} has no {metric.name}")
    if len(points) < 2:
      count = "no usable point" if not points else "one usable point"
      return Delta(None, remark=f"{name} has {count}; interpolation needs two")
  axis = 1 if of_rate else 0
  ranges = [(points[0][axis], points[-1][axis]) for points in pairs]
  low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
  if low >= high:
    unit = metric.unit if of_rate else "bpp"
    if of_rate and metric.falls:
      ranges = [(10 ** (-high / 10), 10 ** (-low / 10)) for low, high in ranges]
    unit = f" {unit}" if unit else ""
    (a_low, a_high), (c_low, c_high) = ranges
    return Delta(
      None,
      remark=f"no common {metric.name if of_rate else 'rate'}: the curve has {c_low:.3g} to "
      f"{c_high:.3g}{unit}, the anchor {a_low:.3g} to {a_high:.3g}{unit}",
    )
  value = _value(tuple(pairs[0]), tuple(pairs[1]), of_rate)
  own_low, own_high = ranges[1]
  if of_rate:
    share = (high - low) / (own_high - own_low)
  else:
    share = math.log(high / low) / math.log(own_high / own_low)
  return Delta(value, (low, high), share, "; ".join(_cautions(pairs, curve, share)))


_Points = tuple[tuple[float, float], ...]


def _value(anchor: _Points, curve: _Points, of_rate: bool) -> float:
  """Per cent of rate, or dB. A pair is computed once: the other way round it is the inverse."""
  if anchor <= curve:
    return _computed(anchor, curve, of_rate)
  value = _computed(curve, anchor, of_rate)
  return 100 * (1 / (1 + value / 100) - 1) if of_rate else -value


@functools.lru_cache(maxsize=20_000)
def _computed(anchor: _Points, curve: _Points, of_rate: bool) -> float:
  bjontegaard = _bjontegaard()
  function = bjontegaard.bd_rate if of_rate else bjontegaard.bd_psnr
  (anchor_rate, anchor_quality), (rate, quality) = (zip(*points) for points in (anchor, curve))
  return float(
    function(
      list(anchor_rate),
      list(anchor_quality),
      list(rate),
      list(quality),
      method="pchip",
      require_matching_points=False,
      min_overlap=0,
    )
  )


def _cautions(
  pairs: Sequence[Sequence[tuple[float, float]]], curve: results.RDCurve, share: float
) -> list[str]:
  cautions = []
  for name, points in zip(("the anchor has ", ""), pairs):
    if len(points) < _FEW_POINTS:
      cautions.append(f"coarse: {name}{len(points)} points")
  beaten = len(curve.bpp) - len(pairs[1])
  if beaten:
    noun = "point" if beaten == 1 else "points"
    cautions.append(f"not counted: {beaten} {noun} beaten by others of the curve")
  if share < _SHORT_OVERLAP:
    cautions.append("short overlap")
  return cautions


def _bjontegaard() -> Any:
  import matplotlib

  matplotlib.use("Agg")  # bjontegaard imports pyplot, which would look for a display.
  import bjontegaard

  return bjontegaard


@dataclasses.dataclass(frozen=True)
class Gain:
  """PSNR of a curve minus the anchor's at equal bytes, over the rates that both have.

  Attributes:
    rates: The common rates, from and to, in bpp.
    above: The intervals of rates in which the curve is higher, in bpp.
    most_db: The greatest difference in dB (negative where the curve is lower everywhere).
    most_at: The rate of `most_db`, in bpp.
    least_db: The smallest difference in dB.
  """

  rates: tuple[float, float]
  above: tuple[tuple[float, float], ...]
  most_db: float
  most_at: float
  least_db: float


def gain(anchor: results.RDCurve, curve: results.RDCurve) -> Optional[Gain]:
  """Where a curve beats the anchor at equal bytes; None where the two have no rates in common."""
  import numpy as np

  pairs = (front(anchor), front(curve))
  if min(len(points) for points in pairs) < 2:
    return None
  low = max(points[0][0] for points in pairs)
  high = min(points[-1][0] for points in pairs)
  if low >= high:
    return None
  (anchor_rate, anchor_psnr), (rate, psnr) = (zip(*points) for points in pairs)
  _, of_anchor, of_curve = _bjontegaard().bd_psnr(
    list(anchor_rate),
    list(anchor_psnr),
    list(rate),
    list(psnr),
    method="pchip",
    require_matching_points=False,
    interpolators=True,
    min_overlap=0,
  )
  log_rates = np.linspace(math.log10(low), math.log10(high), 1001)
  difference = of_curve(log_rates) - of_anchor(log_rates)
  above: list[tuple[float, float]] = []
  start: Optional[float] = None
  for log_rate, higher in zip(log_rates, difference > 0):
    if higher and start is None:
      start = float(10**log_rate)
    if not higher and start is not None:
      above.append((start, float(10**log_rate)))
      start = None
  if start is not None:
    above.append((start, high))
  most = int(np.argmax(difference))
  return Gain(
    rates=(low, high),
    above=tuple(above),
    most_db=float(difference[most]),
    most_at=float(10 ** log_rates[most]),
    least_db=float(difference.min()),
  )


def gain_sentence(found: Optional[Gain]) -> str:
  """A `Gain` for people, without the names of the two curves."""
  if found is None:
    return "no rates in common."
  common = f"{found.rates[0]:.2f} to {found.rates[1]:.2f} bpp"
  most = f"{signed(found.most_db, 2)} dB at {found.most_at:.2f} bpp"
  if not found.above:
    return f"lower at every common rate ({common}); nearest with {most}."
  if found.least_db > 0:
    return (
      f"higher at every common rate ({common}): at most {most}, "
      f"at least {signed(found.least_db, 2)} dB."
    )
  where = " and ".join(f"from {low:.2f} to {high:.2f} bpp" for low, high in found.above)
  return (
    f"higher {where}: at most {most}; elsewhere within {common} lower by up to "
    f"{-found.least_db:.2f} dB."
  )


def signed(value: float, digits: int) -> str:
  """A number with a sign, and a true minus."""
  text = f"{value:+.{digits}f}"
  if float(text) == 0:
    text = text.replace("-", "+")
  return text.replace("-", "\u2212")


# --- Many curves ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Series:
  """A curve as it is drawn and listed.

  Attributes:
    curve: The points; its label is unique in the report.
    publication: Where it is from, if it was not measured here.
    color: Which colour and marker of the palette; -1 for the anchor, which stands apart.
  """

  curve: results.RDCurve
  publication: Optional[results.Publication] = None
  color: int = 0

  @property
  def published(self) -> bool:
    """Whether it is a publication's, not measured here."""
    return self.publication is not None


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A curve against the anchor."""

  series: Series
  rate: Delta
  psnr: Delta
  rate_by_msssim: Delta
  rate_by_lpips: Delta
  gain: Optional[Gain]


def compare(anchor: Series, series: Iterable[Series]) -> list[Comparison]:
  """Every other curve against the anchor."""
  return [
    Comparison(
      s,
      bd_rate(anchor.curve, s.curve),
      bd_psnr(anchor.curve, s.curve),
      bd_rate(anchor.curve, s.curve, MSSSIM),
      bd_rate(anchor.curve, s.curve, LPIPS),
      gain(anchor.curve, s.curve),
    )
    for s in series
    if s.curve is not anchor.curve
  ]


def by_rate(comparisons: Iterable[Comparison]) -> list[Comparison]:
  """The best BD-rate first; those that were refused last, in their order."""
  return sorted(
    comparisons, key=lambda c: (c.rate.value is None, 0 if c.rate.value is None else c.rate.value)
  )


@dataclasses.dataclass(frozen=True)
class Matrix:
  """Every curve against every other.

  Attributes:
    series: The curves, for rows (tested) and columns (anchors) alike.
    rates: BD-rates, a row for each curve; None on the diagonal.
    psnrs: BD-PSNRs likewise.
  """

  series: tuple[Series, ...]
  rates: tuple[tuple[Optional[Delta], ...], ...]
  psnrs: tuple[tuple[Optional[Delta], ...], ...]


def matrix(series: Sequence[Series]) -> Matrix:
  """Every curve against every other, about 0.2 ms a pair."""

  def table(delta: Callable[[results.RDCurve, results.RDCurve], Delta]) -> Any:
    return tuple(
      tuple(None if s is anchor else delta(anchor.curve, s.curve) for anchor in series)
      for s in series
    )

  return Matrix(tuple(series), table(bd_rate), table(bd_psnr))


def pick_anchor(series: Sequence[Series], wanted: Optional[str]) -> Series:
  """The curve that the others are compared with.

  Args:
    series: All curves; there is at least one.
    wanted: A curve's label, its group ("classical-jpeg"), the group without its first part
      ("jpeg"), or a part that only one label has. None: JPEG, else the first classical codec,
      else the first curve.

  Raises:
    AnchorError: No curve, or more than one, is called that.
  """
  if not wanted:
    own = [s for s in series if not s.published]
    jpeg = [s for s in own if s.curve.group == "classical-jpeg"]
    classical = [s for s in own if s.curve.group.startswith("classical-")]
    return [*jpeg, *classical, *own, *series][0]
  name = wanted.casefold()
  exact = [s for s in series if name in (n.casefold() for n in _names(s))]
  found = exact or [s for s in series if name in s.curve.label.casefold()]
  if len(found) == 1 or exact:
    return found[0]
  problem = "is not among the curves" if not found else "fits more than one curve"
  known = "; ".join(f"{s.curve.label} ({_names(s)[-1]})" for s in (found or series))
  raise AnchorError(f"--anchor={wanted}: {problem}. Known: {known}.")


def _names(series: Series) -> list[str]:
  group = series.curve.group
  return [series.curve.label, group, group.partition("-")[2]]


def arranged(series: Sequence[Series], anchor: Series) -> list[Series]:
  """The series with unique labels and one colour a group."""
  groups = list(dict.fromkeys(s.curve.group for s in series if not s.published))
  if anchor.curve.group in groups:
    groups.remove(anchor.curve.group)
  labels: dict[str, int] = {}
  for s in series:
    labels[s.curve.label] = labels.get(s.curve.label, 0) + 1
  arranged = []
  for s in series:
    curve = s.curve
    if labels[curve.label] > 1:
      curve = dataclasses.replace(curve, label=f"{curve.label} ({curve.group})")
    color = groups.index(curve.group) if curve.group in groups else -1
    arranged.append(dataclasses.replace(s, curve=curve, color=color))
  return arranged
