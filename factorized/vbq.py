"""Quantizers of a trained VAE's latents, and their entropy coding.

| method  | code points of a channel              | a latent (mean m, deviation s) becomes     |
|---------|---------------------------------------|--------------------------------------------|
| vbq     | quantiles of its empirical density at | the point z of the least                   |
|         | (2k+1) / 2^(n+1), depths n = 0..N     | (z - m)^2 / (2 s^2) + lambda * bits(z)     |
| uniform | evenly spaced between its extremes    | the nearest point                          |
| kmeans  | the exact one-dimensional k-means     | the nearest point                          |

Variational Bayesian Quantization: Yang, Bamler and Mandt 2020 (ICML, arXiv 2002.08158). One set of
code points serves all rates: a larger lambda takes coarser points, the coarser the wider the
posterior. The paper counts a point's depth, then the depth and its code length. Here bits(z) is the
true code length of the point in the table that files are coded with: made from the points that
calibration pictures took, which changes what they take, a few times over (docs/results.md compares
them).

A table is one (rate, channel): the calibration's counts of the points, smoothed. Counts are what is
kept and exported; probabilities are derived from them with nothing but sums, products and quotients
in float64, so they are the same everywhere.

Files are coded by constriction's asymmetric numeral system (Duda 2013, arXiv 1311.2540), with 24
bits a probability. What it costs over the code length, 3 to 4 bytes, is the state that it starts
from; a range coder's divisions cost up to 9 bytes a Kodak picture. All points of a table that are
rarer than 2^-20, most of the 2,047 at a small rate, are one symbol; which of them it was follows at
the end. As symbols of their own each would take its 2^-24 from the others, 11 bytes a picture.
"""

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional

import constriction
import numpy as np

from common import bitstream, entropy, rd
from common.codec import Latents, TrainableCodec

VERSION = 2  # Of what is built and of how it codes: other points, counts or bytes, another one.
METHODS = ("vbq", "uniform", "kmeans")
MAX_BITS = 10  # N: the greatest depth; 2^(N+1) - 1 code points.
LAMBDAS = tuple(2.0**k for k in range(7, -9, -1))  # Fewest bytes first.
LEVELS = (2, 4, 6, 8, 16, 32, 64, 128, 256)
MAX_SAMPLES = 1 << 16  # Of the calibration, a channel.

_PSEUDO_COUNTS = 1.0  # What all points of a table share beside their counts.
_CHUNK = 1 << 15  # Latents that are searched at once: they and their tables stay in the cache.
_MAX_POINTS = 1 << 16
_MAX_RATES = 256
_MAX_COUNTS = 1 << 26  # Of all rates; 320 channels at 16 lambdas have 10 million.
_PRECISION = 24  # Bits of the coder's probabilities.
_RARE = 2.0**-20  # Points below it share a symbol.
# Of the coder. From a smaller one, symbols at the beginning of their table could cost nothing, and
# a file's length would not bound how many there are.
_START = 1 << _PRECISION
FLATTEN = 0.3  # Of a uniform density in what the code points are quantiles of.
_ROUNDS = 7  # Of making VBQ's tables.
_EARLY_STRIDE = 8
_KNOTS = 1025  # Of the smoothed empirical distribution.
_MARGIN = 0.05  # What lies beyond the calibration's extremes, as a share of their distance.


@dataclasses.dataclass(frozen=True)
class Samples:
  """Posteriors of calibration pictures.

  Attributes:
    mean: [C, M] float32.
    deviation: [C, M] float32, above 0.
  """

  mean: np.ndarray
  deviation: np.ndarray


class Coder:
  """A quantizer at all of its rates, with the tables that its files are coded with.

  Attributes:
    method: One of METHODS.
    settings: float64 [num_rates]: lambda, or the number of levels.
  """

  def __init__(
    self,
    method: str,
    settings: np.ndarray,
    points: Sequence[np.ndarray],
    counts: Sequence[np.ndarray],
  ):
    """Makes it from its code points and what the calibration counted.

    Args:
      method: One of METHODS.
      settings: One number a rate.
      points: One [C, K] float32, increasing, a rate; a single one serves all.
      counts: A [C, K] of integers a rate.

    Raises:
      ValueError: They do not fit each other.
    """
    self.method = method
    self.settings = np.asarray(settings, np.float64)
    self._points = [np.ascontiguousarray(p, np.float32) for p in points]
    self._counts = [np.asarray(c, np.int64) for c in counts]
    if len(self._points) == 1:
      self._points = self._points * len(self._counts)
    shapes = [c.shape for c in self._counts]
    if (
      method not in METHODS
      or self.settings.shape != (len(shapes),)
      or not shapes
      or [p.shape for p in self._points] != shapes
      or any(len(s) != 2 or s[0] != shapes[0][0] or not 2 <= s[1] < _MAX_POINTS for s in shapes)
    ):
      raise ValueError(f"Code points and counts of a {method!r} quantizer do not fit: damaged.")
    if method == "vbq" and (shapes[0][1] + 1) & shapes[0][1]:
      raise ValueError(f"{shapes[0][1]} code points; VBQ has 2^n - 1: damaged.")
    if not all(np.isfinite(p).all() and (np.diff(p) >= 0).all() for p in self._points):
      raise ValueError("The code points are not increasing numbers: damaged.")
    if any(c.min() < 0 or c.max() > 1 << 40 for c in self._counts):
      raise ValueError("The counts are out of range: damaged.")
    self._tables: dict[int, _Tables] = {}

  @property
  def num_rates(self) -> int:
    """How many rates there are; they are in order, the first makes the fewest bytes."""
    return len(self.settings)

  @property
  def default_rate(self) -> int:
    """The one whose trade-off is the training's, lambda = ln 2 (or the middle one)."""
    if self.method == "vbq":
      return int(np.argmin(np.abs(np.log(self.settings / np.log(2)))))
    return self.num_rates // 2

  @property
  def channels(self) -> int:
    """Of the latent."""
    return self._counts[0].shape[0]

  def arrays(self) -> dict[str, np.ndarray]:
    """All of it as arrays; `from_arrays` makes it again. Zero counts are left out."""
    shared = all(p is self._points[0] for p in self._points)
    used = self._points[:1] if shared else self._points
    flat = np.concatenate([c.ravel() for c in self._counts])
    found = np.flatnonzero(flat)
    return {
      "version": np.array([VERSION], np.int32),
      "method": np.array([METHODS.index(self.method)], np.int32),
      "settings": self.settings.copy(),
      "shape": np.array([self.channels, *(c.shape[1] for c in self._counts)], np.int32),
      "points": np.concatenate([p.ravel() for p in used]),
      "counts_place": found.astype(np.int32),
      "counts": flat[found].astype(np.int32),
    }

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Coder":
    """The inverse of `arrays`.

    Raises:
      ValueError, KeyError: They are not such arrays.
    """
    version = np.asarray(arrays.get("version", 1)).tolist()
    if version != [VERSION]:
      raise ValueError(
        f"The quantizer is of version {version}, this code makes and reads {VERSION}: make it anew "
        "with python -m factorized.vbq_eval."
      )
    (number,) = arrays["method"]
    if not 0 <= number < len(METHODS):
      raise ValueError(f"Unknown quantizer number {number}: damaged, or made by newer code.")
    shape = np.asarray(arrays["shape"], np.int64)
    if shape.ndim != 1 or len(shape) < 2 or shape.min() < 1 or shape.max() >= _MAX_POINTS:
      raise ValueError("The shape of the quantizer's tables is damaged.")
    channels, sizes = int(shape[0]), [int(k) for k in shape[1:]]
    if len(sizes) > _MAX_RATES or channels * sum(sizes) > _MAX_COUNTS:
      raise ValueError(
        f"Tables of {channels} channels and {sum(sizes)} points at {len(sizes)} rates are too "
        f"large (at most {_MAX_RATES} rates, {_MAX_COUNTS} counts): damaged or hostile."
      )
    ends = np.cumsum([channels * k for k in sizes])
    place, values = np.asarray(arrays["counts_place"]), np.asarray(arrays["counts"])
    points = np.asarray(arrays["points"], np.float32)
    if place.shape != values.shape or place.ndim != 1 or points.ndim != 1:
      raise ValueError("The quantizer's tables have arrays of wrong shapes: damaged.")
    if len(place) and (place.min() < 0 or place.max() >= ends[-1]):
      raise ValueError("The quantizer's tables count points that there are not: damaged.")
    if len(points) not in (channels * sizes[0], ends[-1]):
      raise ValueError(f"{len(points)} code points do not fit {channels} channels: damaged.")
    flat = np.zeros(ends[-1], np.int64)
    flat[place] = values
    shared = len(points) != ends[-1] or len(sizes) == 1
    used = sizes[:1] if shared else sizes
    return cls(
      METHODS[int(number)],
      np.asarray(arrays["settings"], np.float64),
      [p.reshape(channels, -1) for p in np.split(points, ends[: len(used) - 1])],
      [c.reshape(channels, -1) for c in np.split(flat, ends[:-1])],
    )

  def tables(self, rate: int) -> "_Tables":
    """Of a rate; made when they are first asked for."""
    if rate not in self._tables:
      probabilities = _probabilities(self.method, self._counts[rate])
      self._tables[rate] = _Tables.of(probabilities)
    return self._tables[rate]

  def quantize(self, mean: np.ndarray, deviation: np.ndarray, rate: int) -> np.ndarray:
    """The code points of latents.

    Args:
      mean: [..., C] float32, of the posterior.
      deviation: The same of its standard deviation; uniform and kmeans do not look at it.
      rate: 0 to num_rates - 1.

    Returns:
      int32 [..., C]: ranks among the channel's code points, from below.
    """
    return self.quantize_all(mean, deviation, [rate])[0]

  def quantize_all(
    self, mean: np.ndarray, deviation: np.ndarray, rates: Optional[Sequence[int]] = None
  ) -> list[np.ndarray]:
    """`quantize` at several rates (None: all), most of the work done once for VBQ."""
    chosen = list(range(self.num_rates)) if rates is None else list(rates)
    m, s = _by_channel(mean), _by_channel(deviation)
    if self.method == "vbq":
      prices = [self.settings[r] * self.tables(r).lengths for r in chosen]
      found = search(self._points[0], m, s, prices)
    else:
      found = [nearest(self._points[r], m) for r in chosen]
    return [np.ascontiguousarray(f.T).reshape(mean.shape) for f in found]

  def values(self, symbols: np.ndarray, rate: int) -> np.ndarray:
    """The code points themselves, float32 [..., C], of ranks int32 [..., C]."""
    points = self._points[rate]
    return points[np.arange(self.channels), symbols]

  def bits(self, symbols: np.ndarray, rate: int) -> float:
    """The code length of ranks [..., C] by the tables."""
    lengths = self.tables(rate).lengths
    return float(np.sum(lengths[np.arange(self.channels), symbols], dtype=np.float64))

  def encode(self, symbols: np.ndarray, rate: int) -> bytes:
    """Codes ranks [..., C], channel after channel, and then which rare points they are.

    The bytes: little-endian words, without the zeros at the end of the last one.
    """
    tables, by_channel = self.tables(rate), _by_channel(symbols.astype(np.int32))
    coded = np.take_along_axis(tables.symbols, by_channel, axis=1)
    coder = constriction.stream.stack.AnsCoder(np.array([_START], np.uint32))
    # A stack: what goes in last comes out first.
    for channel, rare in reversed(tables.rare.items()):
      ranks = by_channel[channel][coded[channel] == tables.common[channel].size - 1]
      if len(ranks):
        places = np.searchsorted(rare.ranks, ranks).astype(np.int32)
        coder.encode_reverse(places, rare.table.model)
    for row, table in zip(coded[::-1], reversed(tables.common)):
      coder.encode_reverse(row, table.model)
    words = coder.get_compressed().astype("<u4").tobytes()
    return words[:-4] + words[-4:].rstrip(b"\0")

  def decode(self, data: bytes, shape: tuple[int, ...], rate: int) -> np.ndarray:
    """The inverse of `encode`: int32 of `shape` [..., C].

    Raises:
      bitstream.BitstreamError: The bytes are not what `encode` makes, or too few for the shape.
    """
    tables = self.tables(rate)
    count = int(np.prod(shape[:-1], dtype=np.int64))
    entropy.check_room(data, count * shape[-1], count * tables.fewest_bits)
    words = np.frombuffer(data + bytes(-len(data) % 4), "<u4").astype(np.uint32)
    coded = np.empty([shape[-1], count], np.int32)
    try:
      coder = constriction.stream.stack.AnsCoder(words)
      for row, table in zip(coded, tables.common):
        row[:] = coder.decode(table.model, count)
      out = np.take_along_axis(tables.ranks, coded, axis=1)
      for channel, rare in tables.rare.items():
        (found,) = np.nonzero(coded[channel] == tables.common[channel].size - 1)
        if len(found):
          out[channel, found] = rare.ranks[coder.decode(rare.table.model, len(found))]
    except (AssertionError, ValueError) as e:
      raise bitstream.BitstreamError(f"The entropy decoder fails ({e}): damaged.") from e
    symbols = np.ascontiguousarray(out.T).reshape(shape)
    # Milliseconds, and nothing can be hidden below the state that coding starts from.
    if self.encode(symbols, rate) != data:
      raise bitstream.BitstreamError("The section is not what its symbols are coded as: damaged.")
    return symbols


@dataclasses.dataclass(frozen=True)
class _Table:
  """The coder's of one channel.

  Attributes:
    shares: int64 [n], at least 1, in 2^-24: the probabilities of its symbols.
  """

  shares: np.ndarray

  @classmethod
  def of(cls, probabilities: np.ndarray) -> "_Table":
    """The nearest shares, their sum put right at the largest, where that costs the least."""
    total = 1 << _PRECISION
    shares = np.maximum(np.rint(probabilities * total), 1).astype(np.int64)
    while (excess := int(shares.sum()) - total) != 0:
      largest = np.argmax(shares)
      shares[largest] -= min(excess, shares[largest] // 2)
    return cls(shares)

  @property
  def size(self) -> int:
    """How many symbols there are."""
    return len(self.shares)

  @functools.cached_property
  def model(self) -> Any:
    """Of constriction, which gives each symbol 1 and divides the rest: exactly these shares."""
    rest = (self.shares - 1).astype(np.float64)
    return constriction.stream.model.Categorical(rest, perfect=False)


@dataclasses.dataclass(frozen=True)
class _Rare:
  """One channel's points that are coded in two steps.

  Attributes:
    ranks: int32 [n], increasing.
    probabilities: float64 [n].
  """

  ranks: np.ndarray
  probabilities: np.ndarray

  @functools.cached_property
  def table(self) -> _Table:
    """Which of them it is, once it is known to be one of them."""
    return _Table.of(self.probabilities / math.fsum(self.probabilities.tolist()))


@dataclasses.dataclass(frozen=True)
class _Tables:
  """One rate's.

  Attributes:
    lengths: [C, K] float32, bits of each point.
    probabilities: [C, K] float64.
  """

  lengths: np.ndarray
  probabilities: np.ndarray

  @classmethod
  def of(cls, probabilities: np.ndarray) -> "_Tables":
    return cls((-np.log2(probabilities)).astype(np.float32), probabilities)

  @functools.cached_property
  def is_rare(self) -> np.ndarray:
    """bool [C, K]: which points share their channel's last symbol; at least 2 of it, or none."""
    rare = self.probabilities < _RARE
    number = rare.sum(axis=1, keepdims=True)
    return rare & (number > 1) & (number < rare.shape[1])

  @functools.cached_property
  def symbols(self) -> np.ndarray:
    """int32 [C, K]: what each rank is to the coder."""
    before = np.cumsum(~self.is_rare, axis=1, dtype=np.int32)
    return np.where(self.is_rare, before[:, -1:], before - 1)

  @functools.cached_property
  def ranks(self) -> np.ndarray:
    """int32 [C, K]: what each symbol is, the inverse; the shared one any of its ranks."""
    ranks = np.zeros(self.symbols.shape, np.int32)
    every = np.broadcast_to(np.arange(ranks.shape[1], dtype=np.int32), ranks.shape)
    np.put_along_axis(ranks, self.symbols, every, axis=1)
    return ranks

  @functools.cached_property
  def common(self) -> list[_Table]:
    """Of every channel: the points that are not rare, and then the symbol that the others share."""
    made = []
    for p, rare in zip(self.probabilities, self.is_rare):
      shared = [math.fsum(p[rare].tolist())] if rare.any() else []  # The same on all machines.
      made.append(_Table.of(np.append(p[~rare], shared)))
    return made

  @functools.cached_property
  def rare(self) -> dict[int, _Rare]:
    """By channel, where there are any."""
    made = {}
    for channel in np.flatnonzero(self.is_rare.any(axis=1)):
      (ranks,) = np.nonzero(self.is_rare[channel])
      made[int(channel)] = _Rare(ranks.astype(np.int32), self.probabilities[channel, ranks])
    return made

  @functools.cached_property
  def fewest_bits(self) -> float:
    """Of one latent in each channel, at the least."""
    largest = np.array([table.shares.max() for table in self.common])
    return float(np.sum(_PRECISION - np.log2(largest)))


def _by_channel(x: np.ndarray) -> np.ndarray:
  """[..., C] -> [C, n]."""
  return np.ascontiguousarray(x.reshape(-1, x.shape[-1]).T)


# --- Code points ---------------------------------------------------------------------------------


def depths(num_points: int) -> np.ndarray:
  """The depth of each rank among 2^(N+1) - 1 code points, int64: 2 1 2 0 2 1 2 for N = 2."""
  positions = np.arange(1, num_points + 1)
  lowest_bit = positions & -positions
  return (num_points + 1).bit_length() - 2 - np.log2(lowest_bit).astype(np.int64)


def search(
  points: np.ndarray, mean: np.ndarray, deviation: np.ndarray, prices: Sequence[np.ndarray]
) -> list[np.ndarray]:
  """VBQ's choice at each rate: the least (z - mean)^2 / (2 deviation^2) + price of z.

  Candidates are, at every depth, the point next to the mean: where all points of a depth cost the
  same that is the best of the two that bracket it.

  Args:
    points: [C, K] float32, increasing, K = 2^(N+1) - 1.
    mean: [C, n] float32.
    deviation: [C, n] float32.
    prices: [C, K] each, one a rate.

  Returns:
    The ranks at each rate, int32 [C, n].
  """
  channels, size = mean.shape
  num_points = points.shape[1]
  out = [np.empty([channels, size], np.int32) for _ in prices]
  prices = [np.ascontiguousarray(p, np.float32) for p in prices]
  rows = max(1, min(channels, _CHUNK // max(1, size)))
  columns = max(1, min(size, _CHUNK // rows))

  def work(top: int) -> None:
    part = slice(top, top + rows)
    table = points[part].ravel()
    tables = [p[part].ravel() for p in prices]
    for left in range(0, size, columns):
      place = (part, slice(left, left + columns))
      m, s = mean[place], deviation[place]
      ranks, errors = _candidates(points[part], table, m)
      weight = (0.5 / np.square(s)).ravel()
      errors *= errors
      errors *= weight
      shift = np.repeat(np.arange(m.shape[0], dtype=np.int32) * num_points, m.shape[1])
      for target, price in zip(out, tables):
        best = _cheapest(ranks, errors, price)
        target[place] = (best - shift).reshape(m.shape)

  _in_threads(work, range(0, channels, rows))
  return out


def _candidates(
  points: np.ndarray, table: np.ndarray, mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """At every depth the place in `table` of the point next to each mean, and its distance."""
  num_points = points.shape[1]
  top = num_points + 1  # Positions 1 to top - 1; depth n has the odd multiples of top / 2^(n+1).
  below = np.stack([np.searchsorted(p, m, "right") for p, m in zip(points, mean)]).astype(np.int32)
  shift = (np.arange(len(mean), dtype=np.int32) * num_points - 1)[:, None]
  m = mean.ravel()
  num_depths = top.bit_length() - 1
  places = np.empty([num_depths, mean.size], np.int32)
  errors = np.empty([num_depths, mean.size], np.float32)
  for depth in range(num_depths):
    half = top >> (depth + 1)
    lower = ((below - half) & -(2 * half)) + half
    upper = np.minimum(lower + 2 * half, top - half)
    np.maximum(lower, half, out=lower)
    lower, upper = (lower + shift).ravel(), (upper + shift).ravel()
    to_lower, to_upper = np.abs(m - table[lower]), np.abs(table[upper] - m)
    np.minimum(to_lower, to_upper, out=errors[depth])
    places[depth] = np.where(to_upper < to_lower, upper, lower)
  return places, errors


def _cheapest(places: np.ndarray, errors: np.ndarray, price: np.ndarray) -> np.ndarray:
  """Of the candidates [depths, n], the place of the one with the least error + price."""
  least = errors[0] + price[places[0]]
  best = places[0].copy()
  for place, error in zip(places[1:], errors[1:]):
    cost = price[place]
    cost += error
    better = cost < least
    np.minimum(least, cost, out=least)
    np.copyto(best, place, where=better)
  return best


def nearest(points: np.ndarray, mean: np.ndarray) -> np.ndarray:
  """The rank of the point next to each mean: [C, K] and [C, n] to int32 [C, n]."""
  middles = (points[:, 1:] + points[:, :-1]) / 2
  return np.stack([np.searchsorted(p, m) for p, m in zip(middles, mean)]).astype(np.int32)


def _in_threads(work: Callable[[int], None], items: Sequence[int]) -> None:
  """Calls `work` for all items in two threads: numpy lets go of the interpreter meanwhile."""
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    for _ in pool.map(work, items):
      pass


# --- Statistics ----------------------------------------------------------------------------------


def _probabilities(method: str, counts: np.ndarray) -> np.ndarray:
  """Counts [C, K] to probabilities: `_PSEUDO_COUNTS` more, shared out by what is expected.

  For VBQ a depth is expected as often as it was counted (and once more), its points alike; else all
  points alike.
  """
  counts = counts.astype(np.float64)
  total = counts.sum(axis=1, keepdims=True)
  if method == "vbq":
    depth = depths(counts.shape[1])
    groups = int(depth.max()) + 1
    of_depth = np.stack([counts[:, depth == d].sum(axis=1) for d in range(groups)], axis=1)
    share = (of_depth + 1.0) / (total + groups) / 2.0 ** np.arange(groups)
    expected = np.take(share, depth, axis=1)
  else:
    expected = np.full_like(counts, 1.0 / counts.shape[1])
  return np.ascontiguousarray((counts + _PSEUDO_COUNTS * expected) / (total + _PSEUDO_COUNTS))


def histogram(ranks: np.ndarray, num_points: int) -> np.ndarray:
  """How often each rank occurs in each channel: int [C, n] to int64 [C, num_points]."""
  return np.stack([np.bincount(row, minlength=num_points) for row in ranks])


# --- Building ------------------------------------------------------------------------------------


def posterior(latents: Latents) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation of the latent "y", float32 [B, h, w, C]."""
  loc, log_scale = latents["y"]
  assert log_scale is not None, "A VAE's encoder gives a scale."
  return loc.numpy(), np.exp(log_scale.numpy())


def samples_of(
  codec: TrainableCodec, images: Sequence[np.ndarray], at_most: int = MAX_SAMPLES
) -> Samples:
  """The posteriors of pictures (uint8 [H, W, 3]), evenly thinned to `at_most` places."""
  factor = codec.downsample_factor
  counts = [math.prod(rd.padded_size(s, factor) // factor for s in i.shape[:2]) for i in images]
  total = sum(counts)
  wanted = np.linspace(0, total - 1, min(total, at_most)).astype(np.int64)
  means, deviations, first = [], [], 0
  for image, count in zip(images, counts):
    mean, deviation = posterior(rd.infer(codec, rd.to_batch(image)))
    here = wanted[(wanted >= first) & (wanted < first + count)] - first
    means.append(mean.reshape(count, -1)[here])
    deviations.append(deviation.reshape(count, -1)[here])
    first += count
  return Samples(_by_channel(np.concatenate(means)), _by_channel(np.concatenate(deviations)))


def build_vbq(
  samples: Samples,
  lambdas: Sequence[float] = LAMBDAS,
  max_bits: int = MAX_BITS,
  density: str = "smoothed",
  scheme: str = "iterated",
) -> Coder:
  """VBQ's code points and tables.

  Args:
    samples: Of the calibration.
    lambdas: One a rate, falling.
    max_bits: N.
    density: What the code points are quantiles of, see `quantile_points`.
    scheme: "iterated": bits are true code lengths, by tables made anew in every round from what
      the round before chose. "two-pass" (the paper): bits are the depth; then the depth and its
      code length.
  """
  points = quantile_points(samples, max_bits, density)
  num_points = points.shape[1]
  depth = depths(num_points)
  bits = [np.broadcast_to(depth.astype(np.float32), points.shape)] * len(lambdas)
  counts: list[np.ndarray] = []
  rounds = {"iterated": _ROUNDS, "two-pass": 2}[scheme]
  for turn in range(rounds):
    # All but the last round see a part of the samples.
    part = slice(None, None, 1 if turn + 1 == rounds else _EARLY_STRIDE)
    mean, deviation = (np.ascontiguousarray(x[:, part]) for x in (samples.mean, samples.deviation))
    prices = [l * b for l, b in zip(lambdas, bits)]
    ranks = search(points, mean, deviation, prices)
    counts = [histogram(r, num_points) for r in ranks]
    if turn + 1 < rounds:
      if scheme == "iterated":
        bits = [-np.log2(_probabilities("vbq", c)) for c in counts]
      else:
        bits = [depth - np.log2(_depth_probabilities(c, depth)[:, depth]) for c in counts]
  return Coder("vbq", np.array(lambdas), [points], counts)


def _depth_probabilities(counts: np.ndarray, depth: np.ndarray) -> np.ndarray:
  of_depth = np.stack([counts[:, depth == d].sum(axis=1) for d in range(depth.max() + 1)], axis=1)
  return (of_depth + 1.0) / (of_depth + 1.0).sum(axis=1, keepdims=True)


def build_uniform(samples: Samples, levels: Sequence[int] = LEVELS) -> Coder:
  """Evenly spaced levels from the least to the greatest mean of each channel."""
  low, high = (f(samples.mean.astype(np.float64), axis=1)[:, None] for f in (np.min, np.max))
  return _counted("uniform", [low + (high - low) * np.linspace(0, 1, k) for k in levels], samples)


def build_kmeans(samples: Samples, levels: Sequence[int] = LEVELS) -> Coder:
  """The least squared error with so many levels, each channel for itself; see `kmeans`."""
  return _counted("kmeans", kmeans(samples.mean, levels), samples)


def _counted(method: str, points: Sequence[np.ndarray], samples: Samples) -> Coder:
  points = [p.astype(np.float32) for p in points]
  counts = [histogram(nearest(p, samples.mean), p.shape[1]) for p in points]
  return Coder(method, np.array([p.shape[1] for p in points]), points, counts)


def quantile_points(
  samples: Samples, max_bits: int = MAX_BITS, density: str = "smoothed", flatten: float = FLATTEN
) -> np.ndarray:
  """VBQ's code points: the quantiles (2k+1) / 2^(max_bits+1) of each channel's density.

  Args:
    samples: Of the calibration.
    max_bits: N.
    density: "smoothed": the means' empirical distribution, linear between 1025 of its quantiles,
      with a share of a uniform density over its range. "deep": a deep factorized density (Ballé et
      al. 2018) fitted to the means.
    flatten: That share. Rare latents far out then find points that are fine enough.

  Returns:
    [C, 2^(max_bits+1) - 1] float32, increasing.
  """
  targets = np.arange(1, 2 << max_bits) / (2 << max_bits)
  mean = samples.mean.astype(np.float64)
  if density == "deep":
    return _deep_quantiles(mean, targets)
  if density != "smoothed":
    raise ValueError(f"Unknown density {density!r}. Known: smoothed, deep.")
  levels = np.linspace(0, 1, _KNOTS)
  ordered = np.sort(mean, axis=1)
  places = np.linspace(0, mean.shape[1] - 1, _KNOTS)
  out = np.empty([len(mean), len(targets)])
  for target, row in zip(out, ordered):
    knots = np.interp(places, np.arange(len(row)), row)
    low, high = knots[0], knots[-1]
    reach = max(high - low, 1e-6)
    low, high = low - _MARGIN * reach, high + _MARGIN * reach
    x = np.concatenate([[low], knots, [high]])
    cumulative = np.concatenate([[0.0], levels, [1.0]])
    cumulative = (1 - flatten) * cumulative + flatten * (x - low) / (high - low)
    target[:] = np.interp(targets, cumulative, x)
  return out.astype(np.float32)


def _deep_quantiles(mean: np.ndarray, targets: np.ndarray, steps: int = 2000) -> np.ndarray:
  import tensorflow as tf
  import tensorflow_compression as tfc

  tf.keras.utils.set_random_seed(0)
  centre, spread = np.median(mean, axis=1)[:, None], np.std(mean, axis=1)[:, None] + 1e-6
  data = tf.constant(((mean - centre) / spread).T, tf.float32)
  density = tfc.DeepFactorized((len(mean),), init_scale=0.5)
  optimizer = tf.keras.optimizers.Adam(1e-2)

  @tf.function
  def step(seed):
    rows = tf.random.stateless_uniform([512], [seed, 0], 0, len(data), tf.int32)
    with tf.GradientTape() as tape:
      loss = -tf.reduce_mean(density.log_prob(tf.gather(data, rows)))
    variables = density.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
    return loss

  for i in range(steps):
    optimizer.learning_rate.assign(1e-2 * 0.5 * (1 + np.cos(np.pi * i / steps)))
    step(tf.constant(i))
  weights = {
    v.name.split("/")[-1].split(":")[0]: v.numpy().astype(np.float64) for v in density.variables
  }

  def logits(x):  # [C, n]
    hidden = x[:, None, :]
    for i in range(3):
      hidden = np.logaddexp(0.0, weights[f"matrix_{i}"]) @ hidden + weights[f"bias_{i}"]
      if i < 2:
        hidden = hidden + np.tanh(weights[f"factor_{i}"]) * np.tanh(hidden)
    return hidden[:, 0, :]

  wanted = np.log(targets) - np.log1p(-targets)
  low, high = np.full([len(mean), len(targets)], -1e3), np.full([len(mean), len(targets)], 1e3)
  for _ in range(60):
    middle = (low + high) / 2
    below = logits(middle) < wanted
    low, high = np.where(below, middle, low), np.where(below, high, middle)
  return np.maximum.accumulate(centre + spread * (low + high) / 2, axis=1).astype(np.float32)


def kmeans(data: np.ndarray, levels: Sequence[int], num_groups: int = 1024) -> list[np.ndarray]:
  """One-dimensional k-means, each row for itself: the least squared error there is, no local one.

  By dynamic programming over the sorted data (Wang and Song 2011, "Ckmeans.1d.dp"), where the best
  last boundary grows with the data's end, so that halves bound one another. Rows of more numbers
  than that are taken in `num_groups` groups that are not split: half of them of equal counts, half
  of equal widths.

  Args:
    data: [C, M].
    levels: Numbers of clusters; a row with fewer distinct groups repeats its centres.
    num_groups: At most.

  Returns:
    For each number of levels the centres, float64 [C, levels], increasing.
  """
  ordered = np.sort(data.astype(np.float64), axis=1)
  channels = len(ordered)
  ends = np.stack([_group_ends(row, num_groups) for row in ordered])  # [C, n], the last is `size`.
  n = ends.shape[1]
  zero = np.zeros([channels, 1])
  centre = ordered.mean(axis=1, keepdims=True)
  first, second = (
    np.take_along_axis(
      np.concatenate([zero, np.cumsum((ordered - centre) ** power, axis=1)], axis=1),
      np.concatenate([zero.astype(np.int64), ends], axis=1),
      axis=1,
    )
    for power in (1, 2)
  )
  number = np.concatenate([zero, ends], axis=1)
  width = n + 1
  first, second, number = first.ravel(), second.ravel(), number.ravel()

  def error(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Squared error of the groups begin..end-1 as one cluster, of places in the flat arrays."""
    count = np.maximum(number[end] - number[begin], 1.0)
    return second[end] - second[begin] - (first[end] - first[begin]) ** 2 / count

  base = np.arange(channels) * width
  best = error(np.repeat(base, width), np.arange(channels * width))
  boundaries = [np.zeros([channels, width], np.int16)]  # Of k clusters, where the last one begins.
  for _ in range(1, max(levels)):
    best, boundary = _one_more(best, error, boundaries[-1])
    boundaries.append(boundary.astype(np.int16))
  out = []
  for k in levels:
    centres = np.empty([channels, k])
    end = np.full(channels, n)
    for j in range(k - 1, -1, -1):
      begin = boundaries[j][np.arange(channels), end].astype(np.int64)
      count = number[base + end] - number[base + begin]
      mean = (first[base + end] - first[base + begin]) / np.maximum(count, 1.0) + centre[:, 0]
      # An empty cluster (too few groups) repeats the centre above it.
      above = centres[:, j + 1] if j + 1 < k else ordered[:, -1]
      centres[:, j] = np.where(count > 0, mean, above)
      end = begin
    out.append(np.maximum.accumulate(centres, axis=1))
  return out


BUILDERS: dict[str, Callable[[Samples], Coder]] = {
  "vbq": build_vbq,
  "uniform": build_uniform,
  "kmeans": build_kmeans,
}


def _group_ends(ordered: np.ndarray, num_groups: int) -> np.ndarray:
  """Where groups of sorted numbers end, int64 [min(num_groups, len)]; some may be empty."""
  size = len(ordered)
  if size <= num_groups:
    return np.arange(1, size + 1)
  half = num_groups // 2
  by_count = np.linspace(0, size, half + 1)[1:].astype(np.int64)
  edges = np.linspace(ordered[0], ordered[-1], num_groups - half + 1)[1:]
  return np.sort(np.concatenate([by_count, np.searchsorted(ordered, edges, "right")]))


def _one_more(
  before: np.ndarray, error: Callable[[np.ndarray, np.ndarray], np.ndarray], least: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The least error of the first i groups in one more cluster, and where that cluster begins.

  Args:
    before: [C * (n+1)], the least error of the first i groups, for each row.
    error: Of one cluster, between flat places.
    least: [C, n+1], where the last cluster began with one cluster less: a bound from below.
  """
  channels, width = least.shape
  base = np.arange(channels)[:, None] * width
  best = np.empty([channels, width])
  boundary = np.empty([channels, width], np.int64)
  best[:, 0], boundary[:, 0] = before.reshape(channels, width)[:, 0], 0
  step = 1 << (width - 1).bit_length()
  while step >= 1:  # Ends at odd multiples of `step`: those at even ones are known.
    ends = np.arange(step, width, 2 * step)
    if len(ends):
      low = np.maximum(boundary[:, ends - step], least[:, ends])
      above = ends + step
      known = above < width
      high = np.broadcast_to(ends, low.shape).copy()
      high[:, known] = np.minimum(high[:, known], boundary[:, above[known]])
      high = np.maximum(high, low)
      lengths = (high - low + 1).ravel()
      starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
      row = np.repeat(np.arange(len(lengths)), lengths)
      begin = np.arange(len(row)) - starts[row] + (low + base).ravel()[row]
      cost = before[begin] + error(begin, (ends + base).ravel()[row])
      minimum = np.minimum.reduceat(cost, starts)
      hit = np.flatnonzero(cost <= minimum[row])
      _, index = np.unique(row[hit], return_index=True)
      best[:, ends] = minimum.reshape(low.shape)
      boundary[:, ends] = (begin[hit[index]] - base.repeat(len(ends))).reshape(low.shape)
    step //= 2
  return best.ravel(), boundary
