"""Quantized coefficients that minimise squared error + lambda * bits of the file, for given tables.

The rate is the file's own: run lengths and the Huffman codes that `jpeg_file` will choose,
estimated anew after every pass. The distortion is the squared error of RGB pixels, summed over the
three channels, in the DCT domain (exact but for the decoder's rounding and clipping):

* AC coefficients: in each block the best of all choices of coefficients that are kept, set to zero
  or lowered to the next shorter magnitude, by dynamic programming over the candidates. All blocks
  at once: candidates are the rows of an array, blocks the columns.
* DC coefficients: a Viterbi search over the chain of differences, in stretches side by side.
* The colour transform is not orthogonal: errors of Y, Cb and Cr add up in RGB with their products
  (`forward.GRAM`). So each component aims at its own value less what the errors of the others ask
  for. It matters where chroma is coarse: luma then moves towards (R + G + B) / 3.
* 4:2:0: chroma aims at the samples whose smooth interpolation (libjpeg's "fancy upsampling", the
  default of decoders) comes closest to the picture, and luma makes up for what is left.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import numpy as np

from ljpeg import forward, huffman, jpeg_file

_ZIGZAG = jpeg_file.ZIGZAG
_NATURAL = np.argsort(_ZIGZAG)

# A symbol that the histogram lacks costs its byte in the header beside a long code.
_NEW_SYMBOL_BITS = 8
_NEVER = 1e9


@dataclasses.dataclass(frozen=True)
class Effort:
  """How long to search.

  Attributes:
    rounds: Passes over the components.
    passes: Within a round, how often the Huffman codes are estimated and the AC search is run.
    window: How many candidates in a row the AC search may set to zero amid a block (all of a
      block's beginning or end it may always); 64: no limit.
    dc: Whether the DC coefficients are searched too, in the last pass.
    check_blocks: Of pictures with no more blocks of luma, the result is compared with that of plain
      rounding. The search's codes are estimates: in small pictures they may be far off.
  """

  rounds: int = 2
  passes: int = 2
  window: int = 64
  dc: bool = True
  check_blocks: int = 1024


FAST = Effort(rounds=1, passes=1, window=6, check_blocks=0)
DEFAULT = Effort(rounds=1, passes=2, window=12)
BEST = Effort(rounds=3, passes=2, window=64, check_blocks=10**9)
EFFORTS = {"fast": FAST, "default": DEFAULT, "best": BEST}


class Rates(NamedTuple):
  """What symbols cost under a Huffman code, in bits with the magnitudes' own.

  Attributes:
    ac: float32 [64, 16]: [d, s] of a coefficient of s bits, d places after the last one that is not
      zero (or the DC coefficient).
    end: Of EOB.
    dc: float32 [13]: of a difference of s bits.
  """

  ac: np.ndarray
  end: float
  dc: np.ndarray


def rates(dc_histogram: np.ndarray, ac_histogram: np.ndarray) -> Rates:
  """The costs under the best code for histograms of symbols, int [256] each.

  A symbol's byte in the file's header is shared among its occurrences; one that does not occur
  costs what it would cost once.
  """
  dc, ac = _symbol_bits(dc_histogram), _symbol_bits(ac_histogram)
  run, size = np.arange(63)[:, np.newaxis], np.arange(1, 11)
  table = np.full([64, 16], _NEVER, np.float32)
  table[1:, 1:11] = ac[(run & 15) << 4 | size] + size + (run >> 4) * ac[jpeg_file.ZRL]
  return Rates(table, float(ac[jpeg_file.EOB]), (dc[:13] + np.arange(13)).astype(np.float32))


def _symbol_bits(histogram: np.ndarray) -> np.ndarray:
  lengths = huffman.optimal_lengths(histogram)
  missing = min(int(lengths.max()) + 1, huffman.MAX_BITS) + _NEW_SYMBOL_BITS
  with np.errstate(divide="ignore"):
    known = lengths + _NEW_SYMBOL_BITS / histogram
  return np.where(histogram > 0, known, missing)


# --- AC: dynamic programming over the candidates of each block ------------------------------------


class AcSearch:
  """The candidates of blocks for one quantization table.

  A candidate is a place in a block and a magnitude: the rounded one, and the largest magnitude that
  is a bit shorter where that may pay. All other coefficients are zero.
  """

  def __init__(self, target: np.ndarray, table: np.ndarray, weight: np.ndarray, lambda_: float):
    """Finds the candidates.

    Args:
      target: float32 [n, 64], zigzag order, what the coefficients should be after dequantization.
      table: [64], zigzag order.
      weight: [64], squared error that a squared error of the coefficient costs.
      lambda_: Squared error that a bit is worth.
    """
    self.lambda_ = lambda_
    self.num_blocks = len(target)
    scaled = (target * (1 / table.astype(np.float32))).reshape(-1)
    flat = np.flatnonzero(np.abs(scaled) > 0.5)
    flat = flat[flat & 63 != 0]
    x = scaled[flat]
    self._negative = x < 0
    x = np.abs(x)
    place = flat & 63
    value = np.minimum(np.rint(x), jpeg_file.MAX_AC).astype(np.int64)
    value = np.maximum(value, 1)  # Just above one half, rint may give 0.
    size = jpeg_file.SIZE[value].astype(np.int64)
    scale = (np.asarray(weight, np.float32) * table.astype(np.float32) ** 2)[place]
    # Squared error against that of zero.
    gain = scale * value * (value - 2 * x)
    lower = (1 << (size - 1)) - 1
    lower_gain = scale * lower * (lower - 2 * x)
    # A magnitude of one bit less saves that bit, and a few of its symbol's at the most.
    also = np.flatnonzero((lower > 0) & (lower_gain - gain < 8 * lambda_))
    if len(also):
      after = also + 1
      flat, value, size = (
        np.insert(a, after, b)
        for a, b in ((flat, flat[also]), (value, lower[also]), (size, size[also] - 1))
      )
      gain = np.insert(gain, after, lower_gain[also])
      self._negative = np.insert(self._negative, after, self._negative[also])
    self._flat, self._value = flat, value
    block, place = flat >> 6, flat & 63
    counts = np.bincount(block, minlength=self.num_blocks)
    # Blocks with many candidates come first: those with k or more are the first columns.
    order = np.argsort(-counts, kind="stable")
    self._blocks = order[: np.count_nonzero(counts)]
    rank = np.empty(self.num_blocks, np.int64)
    rank[order] = np.arange(self.num_blocks)
    self._row = np.arange(1, len(flat) + 1) - (np.cumsum(counts) - counts)[block]
    self._col = rank[block]
    rows = int(counts.max(initial=0)) + 1
    self._active = len(self._blocks) - np.cumsum(np.bincount(counts[self._blocks], minlength=rows))
    shape = (rows, len(self._blocks))
    self._place = np.zeros(shape, np.int32)  # Times 16; row 0 is the DC coefficient.
    self._place[self._row, self._col] = place * 16
    self._size = np.zeros(shape, np.int32)
    self._size[self._row, self._col] = size
    self._gain = np.zeros(shape, np.float32)
    self._gain[self._row, self._col] = gain

  def solve(self, rates: Rates, window: int = 64) -> np.ndarray:
    """The best coefficients: int16 [n, 64], zigzag order, DC 0."""
    rows, cols = self._place.shape
    lambda_ = self.lambda_
    cost = (rates.ac.astype(np.float64) * lambda_).astype(np.float32).reshape(-1)
    end_cost = np.float32(lambda_ * rates.end)
    # total[j]: the least cost of a block up to candidate j, if that is kept.
    total = np.zeros((rows, cols), np.float32)
    previous = np.zeros((rows, cols), np.int8)
    best = np.full(cols, end_cost, np.float32)
    last = np.zeros(cols, np.int64)
    for j in range(1, rows):
      n = int(self._active[j - 1])
      place = self._place[j, :n]
      own = place + self._size[j, :n]
      low = max(0, j - window)
      # From each candidate before: two at one place have the distance 0, which is never taken.
      options = cost.take(own - self._place[low:j, :n])
      options += total[low:j, :n]
      chosen = options.argmin(0)
      found = options.min(0)
      chosen += low
      if low:  # Everything before it is zero.
        alone = cost.take(own)
        better = alone < found
        found = np.where(better, alone, found)
        chosen[better] = 0
      found += self._gain[j, :n]
      total[j, :n] = found
      previous[j, :n] = chosen
      found = found + np.where(place == 63 * 16, np.float32(0), end_cost)
      better = found < best[:n]
      np.copyto(best[:n], found, where=better)
      last[:n][better] = j
    kept = np.zeros((rows, cols), bool)
    columns = np.flatnonzero(last)
    current = last[columns]
    while len(columns):
      kept[current, columns] = True
      current = previous[current, columns].astype(np.int64)
      going = np.flatnonzero(current)
      columns, current = columns[going], current[going]
    chosen = kept[self._row, self._col]
    values = np.where(self._negative[chosen], -self._value[chosen], self._value[chosen])
    blocks = np.zeros((self.num_blocks, 64), np.int16)
    blocks.reshape(-1)[self._flat[chosen]] = values
    return blocks


# --- DC: Viterbi over stretches of the chain ------------------------------------------------------


def search_dc(
  target: np.ndarray, weight: float, lambda_: float, bits: np.ndarray, stretch: int = 32
) -> np.ndarray:
  """DC coefficients for a chain of blocks, int64 [n].

  Each is the rounded target, one less or one more. The chain is cut into stretches that are
  searched side by side with their neighbours held fixed, twice, the second time with other cuts.

  Args:
    target: float [n], in units of the table, in the order in which the blocks are coded.
    weight: Squared error that a squared error of 1 in these units costs.
    lambda_: Squared error that a bit is worth.
    bits: float [13], what a difference costs by its number of bits.
    stretch: Blocks in a stretch.
  """
  target = np.asarray(target, np.float64)
  value = np.rint(target).astype(np.int64)
  if not len(value):
    return value
  cost = lambda_ * np.asarray(bits, np.float64)
  for offset in (0, stretch // 2):
    value = _search_stretches(target, value, weight, cost, stretch, offset)
  return value


def _search_stretches(
  target: np.ndarray,
  value: np.ndarray,
  weight: float,
  cost: np.ndarray,
  stretch: int,
  offset: int,
) -> np.ndarray:
  n = len(value)
  number = -(-(n + offset) // stretch)
  size = number * stretch
  index = np.arange(size) - offset
  inside = ((index >= 0) & (index < n)).reshape(number, stretch)
  clipped = np.clip(index, 0, n - 1)
  x = target[clipped].reshape(number, stretch)
  # The candidates; outside of the chain all three are the same: 0 before it, its last after it.
  around = np.rint(x).astype(np.int64)
  steps = np.array([-1, 0, 1])
  before = value[np.clip(np.arange(number) * stretch - offset - 1, 0, n - 1)]
  before = np.where(np.arange(number) * stretch - offset > 0, before, 0)
  after_index = (np.arange(number) + 1) * stretch - offset
  after = value[np.clip(after_index, 0, n - 1)]
  has_after = after_index < n
  size_of = jpeg_file.SIZE
  total = np.zeros((number, 3))
  candidates = np.repeat(before[:, np.newaxis], 3, axis=1)
  back = np.zeros((stretch, number, 3), np.int8)
  values = np.zeros((stretch, number, 3), np.int64)
  for t in range(stretch):
    here = inside[:, t]
    new = np.where(here[:, np.newaxis], around[:, t, np.newaxis] + steps, candidates)
    # [number, new, old]
    difference = np.abs(new[:, :, np.newaxis] - candidates[:, np.newaxis, :])
    option = total[:, np.newaxis, :] + cost[size_of[np.minimum(difference, 4095)]]
    option = np.where(difference > jpeg_file.MAX_DC_DIFFERENCE, _NEVER * cost[1], option)
    chosen = option.argmin(2)
    found = np.take_along_axis(option, chosen[:, :, np.newaxis], 2)[:, :, 0]
    found = found + weight * (new - x[:, t, np.newaxis]) ** 2
    # Outside of the chain nothing happens.
    total = np.where(here[:, np.newaxis], found, total)
    back[t] = np.where(here[:, np.newaxis], chosen, np.arange(3))
    values[t] = candidates = new
  difference = np.abs(after[:, np.newaxis] - candidates)
  total = total + np.where(has_after[:, np.newaxis], cost[size_of[np.minimum(difference, 4095)]], 0)
  state = total.argmin(1)
  rows = np.arange(number)
  found_values = np.empty((number, stretch), np.int64)
  for t in range(stretch - 1, -1, -1):
    found_values[:, t] = values[t, rows, state]
    state = back[t, rows, state]
  return found_values.reshape(-1)[offset : offset + n]


# --- Pictures -------------------------------------------------------------------------------------


class Source(NamedTuple):
  """A picture as the search sees it.

  Attributes:
    full: Y, Cb and Cr at full resolution, float32 [n, 64] each: blocks row by row, zigzag order; of
      a grey picture one.
    aims: What each component's coefficients should be if the others had no error: `full`, but for
      chroma of 4:2:0 the least squares at half resolution.
    shape: (rows, cols) of these blocks.
    size: (height, width) in pixels.
    subsampling: Of the file.
  """

  full: tuple[np.ndarray, ...]
  aims: tuple[np.ndarray, ...]
  shape: tuple[int, int]
  size: tuple[int, int]
  subsampling: str

  @property
  def weights(self) -> tuple[np.ndarray, ...]:
    """Squared RGB error that a squared error of each component's coefficients costs, [64] each."""
    result = [np.full(64, forward.GRAM[i, i], np.float32) for i in range(len(self.full))]
    if self.subsampling == "4:2:0":
      gain = _UPSAMPLING_GAIN.reshape(64)[_ZIGZAG].astype(np.float32)
      result[1:] = [w * gain for w in result[1:]]
    return tuple(result)


# What smooth interpolation makes of the energy of a coefficient of half resolution: by frequency,
# vertical and horizontal, exact for cosines without end. Repeated pixels would have 4 everywhere.
_UPSAMPLING_GAIN = np.multiply.outer(*[1.25 + 0.75 * np.cos(np.pi * np.arange(8) / 8)] * 2)


def source(image: np.ndarray, subsampling: str = "4:4:4") -> Source:
  """Prepares a picture, uint8 [H, W, 3] RGB or [H, W] grey, for `optimise`."""
  size = (image.shape[0], image.shape[1])
  blocks = forward.coefficients(image)
  subsampling = subsampling if len(blocks) > 1 else "4:4:4"
  jpeg_file.grid(size, subsampling, 1)  # Checks the name.
  full = tuple(b.reshape(-1, 64)[:, _ZIGZAG] for b in blocks)
  shape = (blocks[0].shape[0], blocks[0].shape[1])
  aims = full
  if subsampling == "4:2:0":
    aims = (full[0], *(_halved(f, shape, jpeg_file.grid(size, subsampling, 1)) for f in full[1:]))
  return Source(full, aims, shape, size, subsampling)


def _halved(full: np.ndarray, shape: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
  """Coefficients of half resolution, [rows * cols, 64], closest to those of full resolution."""
  plane = _downsample(_plane(full, shape))
  more = ((0, 8 * grid[0] - plane.shape[0]), (0, 8 * grid[1] - plane.shape[1]))
  return forward.dct(np.pad(plane, more, "edge")).reshape(-1, 64)[:, _ZIGZAG]


class Result(NamedTuple):
  """What a search found.

  Attributes:
    components: int16 [rows, cols, 8, 8] each, for `jpeg_file.write_jpeg`.
    tables: int64 [8, 8], luma and chroma.
    error: Squared error of RGB pixels, summed over pixels and channels, before the decoder's
      rounding and clipping; blocks beyond the edges count in whole.
    num_bits: Of the whole file but for stuffed bytes and up to 7 bits of padding.
    size: (height, width).
    subsampling: "4:4:4" or "4:2:0".
  """

  components: tuple[np.ndarray, ...]
  tables: tuple[np.ndarray, ...]
  error: float
  num_bits: int
  size: tuple[int, int]
  subsampling: str

  def cost(self, lambda_: float) -> float:
    """error + lambda * bits."""
    return self.error + lambda_ * self.num_bits

  def file(self) -> bytes:
    """The .jpg file."""
    return jpeg_file.write_jpeg(self.components, self.tables, self.size, self.subsampling)


class _State:
  """Quantized components, and what they leave over."""

  def __init__(self, source: Source, tables: Sequence[np.ndarray]):
    self.source = source
    self.number = len(source.full)
    checked = [np.asarray(t, np.int64) for t in tables]
    checked += checked[-1:] * (2 - len(checked))
    self.tables = tuple(checked[: min(2, self.number)])
    self._zigzag = [t.reshape(64)[_ZIGZAG].astype(np.float32) for t in checked]
    self.weights = source.weights
    self.blocks: list[np.ndarray] = [
      np.zeros((self.grid(i)[0] * self.grid(i)[1], 64), np.int16) for i in range(self.number)
    ]
    # Reconstruction less original, at full resolution.
    self.errors: list[Optional[np.ndarray]] = [None] * self.number

  def grid(self, component: int) -> tuple[int, int]:
    return jpeg_file.grid(self.source.size, self.source.subsampling, component)

  def table(self, component: int) -> np.ndarray:
    """[64] float32, zigzag order."""
    return self._zigzag[min(component, 1)]

  def half(self, component: int) -> bool:
    return component > 0 and self.source.subsampling == "4:2:0"

  def target(self, component: int) -> np.ndarray:
    """What a component's coefficients should be, given the errors of the others: [n, 64]."""
    if all(e is None for i, e in enumerate(self.errors) if i != component):
      return self.source.aims[component]
    full = self.source.full[component]
    for other, error in enumerate(self.errors):
      if other != component and error is not None:
        share = forward.GRAM[component, other] / forward.GRAM[component, component]
        full = full - np.float32(share) * error
    if not self.half(component):
      return full
    return _halved(full, self.source.shape, self.grid(component))

  def set(self, component: int, blocks: np.ndarray) -> None:
    self.blocks[component] = blocks
    found = blocks * self.table(component)
    if self.half(component):
      rows, cols = self.source.shape
      plane = _upsample(_plane(found, self.grid(component))[: 4 * rows, : 4 * cols])
      found = forward.dct(plane).reshape(-1, 64)[:, _ZIGZAG]
    self.errors[component] = found - self.source.full[component]

  def order(self, component: int) -> np.ndarray:
    """Indexes of a component's blocks in coding order."""
    factors = jpeg_file.SUBSAMPLINGS[self.source.subsampling] if component == 0 else (1, 1)
    order, _ = jpeg_file.coding_order(*self.grid(component), factors)
    return order[order >= 0]

  def result(self) -> Result:
    components = tuple(
      b[:, _NATURAL].reshape(*self.grid(i), 8, 8) for i, b in enumerate(self.blocks)
    )
    plan = jpeg_file.plan(components, self.tables, self.source.size, self.source.subsampling)
    error = 0.0
    for i, a in enumerate(self.errors):
      for j, b in enumerate(self.errors[: i + 1]):
        if a is not None and b is not None:
          both = float(np.einsum("nk,nk->", a, b, dtype=np.float64, casting="same_kind"))
          error += (1 + (i != j)) * float(forward.GRAM[i, j]) * both
    return Result(
      components, self.tables, error, plan.num_bits, self.source.size, self.source.subsampling
    )


def _plane(blocks: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  return forward.idct(blocks[:, _NATURAL].reshape(*shape, 8, 8))


def _upsample(plane: np.ndarray) -> np.ndarray:
  """libjpeg's smooth interpolation, without its rounding: [h, w] -> [2h, 2w]."""
  for axis in (0, 1):
    plane = np.moveaxis(plane, axis, 0)
    before = np.concatenate([plane[:1], plane[:-1]])
    after = np.concatenate([plane[1:], plane[-1:]])
    double = np.empty((2 * len(plane), plane.shape[1]), plane.dtype)
    double[::2] = (3 * plane + before) / 4
    double[1::2] = (3 * plane + after) / 4
    plane = np.moveaxis(double, 0, axis)
  return plane


def _downsample(plane: np.ndarray) -> np.ndarray:
  """The samples from which `_upsample` comes closest to a plane [2h, 2w], in squares: [h, w]."""
  for axis in (0, 1):
    plane = np.ascontiguousarray(np.moveaxis(plane, axis, 0))
    even, odd = plane[::2], plane[1::2]
    right = 0.75 * (even + odd)
    right[:-1] += 0.25 * even[1:]
    right[1:] += 0.25 * odd[:-1]
    right[0] += 0.25 * even[0]
    right[-1] += 0.25 * odd[-1]
    plane = np.moveaxis(_solve_normal(right), 0, axis)
  return plane


def _solve_normal(right: np.ndarray) -> np.ndarray:
  """Solves the normal equations of smooth interpolation along axis 0: three diagonals."""
  n = len(right)
  diagonal = np.full(n, 1.25)
  diagonal[0] = diagonal[-1] = 1.625
  if n == 1:
    return right / 2
  solved = right.copy()
  for i in range(1, n):
    factor = 0.375 / diagonal[i - 1]
    diagonal[i] -= factor * 0.375
    solved[i] -= np.float32(factor) * solved[i - 1]
  solved[-1] /= np.float32(diagonal[-1])
  for i in range(n - 2, -1, -1):
    solved[i] -= np.float32(0.375) * solved[i + 1]
    solved[i] /= np.float32(diagonal[i])
  return solved


# Blocks that are searched together: their arrays fit the processor's cache.
_CHUNK = 4096

# Magnitudes under this share of a step start as zero; a first guess of what the search will find.
_DEAD_ZONE = 0.64


def plain(source: Source, tables: Sequence[np.ndarray]) -> Result:
  """Divides and rounds, as simple encoders do."""
  state = _State(source, tables)
  for i, target in enumerate(source.aims):
    state.set(i, _clipped(np.rint(target / state.table(i))))
  return state.result()


def _clipped(scaled: np.ndarray) -> np.ndarray:
  scaled[:, 1:] = np.clip(scaled[:, 1:], -jpeg_file.MAX_AC, jpeg_file.MAX_AC)
  scaled[:, 0] = np.clip(scaled[:, 0], -1024, 1023)
  return scaled.astype(np.int16)


def optimise(
  source: Source,
  tables: Sequence[np.ndarray],
  lambda_: float,
  effort: Effort = DEFAULT,
  start: Optional[Result] = None,
) -> Result:
  """Coefficients of a picture that minimise error + lambda_ * bits for given tables.

  Args:
    source: The picture.
    tables: Luma and chroma (grey: luma), [8, 8] of whole numbers 1..255, natural order.
    lambda_: Squared error of RGB (summed over the three channels) that a bit is worth, over 0.
      Where a model's loss is bpp + rd_lambda * MSE, that is 3 / rd_lambda. About 0.45 times the
      square of the tables' level is best.
    effort: How long to search.
    start: What an earlier search found, perhaps with other tables; then the search goes on there.

  Returns:
    Never more error + lambda_ * bits than plain rounding has, where `effort.check_blocks` says so
    and there is no start.
  """
  if not lambda_ > 0:
    raise ValueError(f"lambda_ must be over 0, not {lambda_}.")
  state = _State(source, tables)
  if start is not None:
    for i, blocks in enumerate(start.components):
      state.set(i, blocks.reshape(-1, 64)[:, _ZIGZAG])
  groups = [(1, 2), (0,)] if state.number == 3 else [(0,)]
  for number in range(effort.rounds):
    for group in groups:
      _search_group(state, group, lambda_, effort, fresh=number == 0 and start is None)
  result = state.result()
  if len(source.full[0]) <= effort.check_blocks and start is None:
    simple = plain(source, tables)
    if simple.cost(lambda_) < result.cost(lambda_):
      return simple
  return result


def _search_group(
  state: _State, group: tuple[int, ...], lambda_: float, effort: Effort, fresh: bool
) -> None:
  """Searches the components that share a Huffman code."""
  targets = {i: state.target(i) for i in group}
  searches = {
    i: [
      AcSearch(target[k : k + _CHUNK], state.table(i), state.weights[i], lambda_)
      for k in range(0, len(target), _CHUNK)
    ]
    for i, target in targets.items()
  }
  found = {i: state.blocks[i] for i in group}
  if fresh:
    for i, target in targets.items():
      scaled = target / state.table(i)
      guess = _clipped(np.rint(scaled))
      guess[:, 1:][np.abs(scaled[:, 1:]) < _DEAD_ZONE] = 0
      found[i] = guess
  for number in range(effort.passes):
    histograms = [jpeg_file.symbols(found[i][state.order(i)]).histograms() for i in group]
    dc, ac = np.sum(histograms, axis=0)
    known = rates(dc, ac)
    for i in group:
      blocks = np.concatenate([s.solve(known, effort.window) for s in searches[i]])
      step = float(state.table(i)[0])
      scaled = targets[i][:, 0] / step
      if effort.dc and number == effort.passes - 1:
        order = state.order(i)
        weight = float(state.weights[i][0]) * step**2
        blocks[order, 0] = search_dc(scaled[order], weight, lambda_, known.dc)
      else:
        blocks[:, 0] = np.rint(scaled)
      found[i] = blocks
  for i in group:
    state.set(i, found[i])


# --- Tables of a picture's own --------------------------------------------------------------------


def fitted_tables(source: Source, result: Result) -> tuple[np.ndarray, ...]:
  """The tables with the least squared error for the coefficients as they are: they cost no bits.

  For each frequency, the step whose multiples come closest to the targets; where all coefficients
  are zero, the step stays.
  """
  state = _State(source, result.tables)
  for i, blocks in enumerate(result.components):
    state.set(i, blocks.reshape(-1, 64)[:, _ZIGZAG])
  sums = np.zeros((2, len(result.tables), 64))
  for i, blocks in enumerate(state.blocks):
    levels, target = blocks.astype(np.float64), state.target(i)
    kind, weight = min(i, 1), state.weights[i].astype(np.float64)
    sums[0, kind] += weight * np.einsum("nk,nk->k", levels, target)
    sums[1, kind] += weight * np.einsum("nk,nk->k", levels, levels)
  tables = []
  for table, top, bottom in zip(result.tables, *sums):
    flat = table.reshape(64)[_ZIGZAG].astype(np.float64)
    steps = np.divide(top, bottom, out=flat, where=bottom > 0)
    tables.append(np.clip(np.rint(steps), 1, 255).astype(np.int64)[_NATURAL].reshape(8, 8))
  return tuple(tables)


def optimise_with_tables(
  source: Source,
  tables: Sequence[np.ndarray],
  lambda_: float,
  steps: Sequence[float] = (0.1, 0.05),
  progress: Optional[Callable[[int, int, Result], None]] = None,
) -> Result:
  """Coefficients and tables of one picture together: error + lambda_ * bits goes down step by step.

  In turn: the coefficients are searched; the tables are fitted to them; the tables' level, slope
  over the frequency and DC step are changed by `steps` as long as that helps.

  Args:
    source: The picture.
    tables: Where to start, luma and chroma.
    lambda_: Squared error of RGB that a bit is worth.
    steps: Relative changes, tried one after the other.
    progress: Called as (searches done, searches at most, the best so far); may raise to stop.
  """
  quick = Effort(rounds=1, passes=1, window=16)
  best = optimise(source, tables, lambda_, DEFAULT)
  frequency = np.add.outer(np.arange(8), np.arange(8)) / 14
  dc = np.zeros((8, 8))
  dc[0, 0] = 1
  shapes = [np.ones((8, 8)), frequency - 0.5, dc]
  moves = [(kind, shape) for kind in range(len(best.tables)) for shape in shapes]
  tries = 3  # Of a move at most.
  total = 1 + len(steps) * (1 + tries * len(moves)) + 2
  done = 0

  def report(count: int) -> None:
    nonlocal done
    done += count
    if progress is not None:
      progress(done, total, best)

  def better(candidate: Sequence[np.ndarray], effort: Effort = quick) -> bool:
    nonlocal best
    if all(np.array_equal(a, b) for a, b in zip(candidate, best.tables)) and effort is quick:
      return False
    found = optimise(source, candidate, lambda_, effort, start=best)
    improved = found.cost(lambda_) < best.cost(lambda_)
    best = found if improved else best
    return improved

  report(1)
  for step in steps:
    better(fitted_tables(source, best))
    report(1)
    for kind, shape in moves:
      tried = 0
      for direction in (step, -step):
        while tried < tries:
          moved = list(best.tables)
          moved[kind] = np.clip(np.rint(moved[kind] * (1 + direction * shape)), 1, 255).astype(
            np.int64
          )
          tried += 1
          if not better(moved):
            break
      report(tries)
  better(fitted_tables(source, best))
  report(1)
  better(best.tables, BEST)
  report(1)
  return best
