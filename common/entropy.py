"""Priors and range coding: `bits()` in training, `encode()`/`decode()` for files.

The range coder is tensorflow_compression's. Its tables are built here, in float64 and with 16 bits
instead of 12: the quantized probabilities then cost below 0.1% over the likelihoods.
"""

import collections
import dataclasses
import functools
import math
import os
import types
import zlib
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Callable, Optional, TypeVar

import numpy as np
import tensorflow as tf
import tensorflow_compression as tfc

from common.bitstream import BitstreamError, Cursor, varint

_T = TypeVar("_T")
_U = TypeVar("_U")

PRECISION = 16  # Bits of the quantized probabilities.
_TAIL_MASS = 2.0**-15  # Coded by the escape symbol, each side half of it.
_TAIL_DEVIATIONS = 4.17  # Where a normal density has that tail mass.
_MAX_SYMBOLS = 4096  # Longest table; what lies outside is escaped as well.
MAX_ABS_SYMBOL = 1 << 28
_SYMBOLS_A_STREAM = 1 << 18  # At most; more are coded in several streams.
_SURE = (1 << PRECISION) - 32  # The least count of a 0 that is all but sure.
OFFSET_BITS = 10  # Fractional bits of a factorized prior's quantization offset.

# The 64 scales of the Gaussian conditional, 0.11 to 256: natural logarithms, evenly spaced.
# Literals, so that no machine's logarithm has a say in them.
NUM_SCALES = 64
LOG_SCALE_MIN = -2.2072749131897207
LOG_SCALE_STEP = 0.12305479932808386


@dataclasses.dataclass(frozen=True)
class CodingTables:
  """Quantized distributions of integers for the range coder, one row an index.

  Attributes:
    cdf: int32, the rows one after the other: PRECISION, then the cumulative counts from 0 to
      2^PRECISION; a row's last symbol is the escape.
    first: int32 [rows], the integer that is each row's symbol 0.
    escape: int32 [rows], the symbol that stands for all other integers.
    best_bits: float64 [rows], what each row's cheapest symbol costs: bounds how many symbols a
      given number of bytes can hold.
    num_sure: How many rows from the first on say 0 all but surely, with all but 32 of the
      2^PRECISION counts.
  """

  cdf: np.ndarray
  first: np.ndarray
  escape: np.ndarray
  best_bits: np.ndarray
  num_sure: int

  def arrays(self) -> dict[str, np.ndarray]:
    """The tables as arrays of their own; `from_arrays` makes them again."""
    return {"cdf": self.cdf.copy(), "first": self.first.copy()}

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "CodingTables":
    """The inverse of `arrays`.

    Raises:
      ValueError: They are no tables.
    """
    cdf, first = np.array(arrays["cdf"], np.int32), np.array(arrays["first"], np.int32)
    total = 1 << PRECISION
    ends = np.flatnonzero(cdf == total)
    begins = np.append(0, ends + 1)[:-1]
    whole = len(ends) == len(first) > 0 and ends[-1] == len(cdf) - 1
    if not whole or np.any(cdf[begins] != PRECISION) or np.any(cdf[begins + 1] != 0):
      raise ValueError("These arrays are no coding tables: damaged, or made by other code.")
    counts = [np.diff(cdf[b + 1 : e + 1]) for b, e in zip(begins, ends)]
    if any(len(c) < 2 or c.min() < 1 for c in counts):
      raise ValueError("These coding tables have empty rows or symbols: damaged.")
    if np.abs(first.astype(np.int64)).max() > MAX_ABS_SYMBOL:
      raise ValueError(f"These coding tables begin beyond {MAX_ABS_SYMBOL}: damaged.")
    is_sure = [0 <= -f < len(c) - 1 and c[-f] >= _SURE for f, c in zip(first, counts)]
    return cls(
      cdf=cdf,
      first=first,
      escape=np.array([len(c) - 1 for c in counts], np.int32),
      best_bits=np.array([-np.log2(c.max() / total) for c in counts]),
      num_sure=is_sure.index(False) if False in is_sure else len(is_sure),
    )


def make_tables(pmfs: list[np.ndarray], first: np.ndarray) -> CodingTables:
  """Tables from probabilities.

  Args:
    pmfs: For each row, float64 [n], the probabilities of the integers first, first + 1, ...; what
      is missing to 1 goes to the escape symbol.
    first: [rows] integers.
  """
  rows = []
  for pmf in pmfs:
    counts = _quantize(np.append(pmf, max(1.0 - pmf.sum(), 0.0)), 1 << PRECISION)
    rows.append(np.concatenate([[PRECISION, 0], np.cumsum(counts)]))
  return CodingTables.from_arrays({"cdf": np.concatenate(rows), "first": np.asarray(first)})


def _quantize(pmf: np.ndarray, total: int) -> np.ndarray:
  """Integer counts >= 1 that sum to `total`, nearly proportional to `pmf`."""
  counts = np.maximum(1, np.round(pmf / pmf.sum() * total)).astype(np.int64)
  while (excess := int(counts.sum()) - total) != 0:
    # Take from (or give to) the largest, where the relative change costs the least.
    order = np.argsort(-counts, kind="stable")[: abs(excess)]
    if excess > 0:
      order = order[counts[order] > 1]
    counts[order] -= np.sign(excess)
  return counts


def encode(tables: CodingTables, symbols: np.ndarray, rows: Optional[np.ndarray] = None) -> bytes:
  """Codes integers, in streams of their own for bands of them: several threads at once.

  The bytes: for each stream but the last its length (varint), then the streams. A stream: its
  exceptions (only with `rows`), the length of the overflow (varint), the overflow, the range
  coder's bytes. A value outside of its row is the escape symbol in the range coder, and its
  distance a varint in the overflow. (tensorflow_compression's own escape decodes damaged data
  without end.) A stream more costs about five bytes; how many there are follows from the shape.

  With `rows`, symbols that their rows say are 0 all but surely (`CodingTables.num_sure`) are not in
  the range coder: the exceptions are their number, and for each how far it is from the one before
  and its value, varints. A quarter to a half of a hyperprior's symbols need no coder then; what
  they cost is next to nothing either way.

  Args:
    tables: The distributions.
    symbols: int32 [..., C], absolute values at most MAX_ABS_SYMBOL.
    rows: Integers, the shape of `symbols`: each one's row of `tables`. None: the last axis chooses
      the row, of which there are C.
  """
  if max(symbols.max(initial=0), -int(symbols.min(initial=0))) > MAX_ABS_SYMBOL:
    raise ValueError(f"Symbols lie within -{MAX_ABS_SYMBOL}..{MAX_ABS_SYMBOL}.")
  flat, flat_rows = _flat(symbols), None if rows is None else _flat(rows)

  def encode_band(band: slice) -> bytes:
    if flat_rows is None:
      return _encode_channels(tables, flat[band])
    return _encode_rows(tables, flat[band].reshape(-1), flat_rows[band].reshape(-1))

  streams = _in_threads(encode_band, _bands(flat.shape))
  return b"".join(varint(len(s)) for s in streams[:-1]) + b"".join(streams)


def _encode_channels(tables: CodingTables, symbols: np.ndarray) -> bytes:
  """One stream of `encode` for int32 [n, C], a row for each channel."""
  overflow: list[bytes] = []
  relative = symbols - tables.first
  _escape(relative, tables.escape, overflow)
  with tf.device("/cpu:0"):
    handle = tfc.create_range_encoder([], tables.cdf)
    handle = tfc.entropy_encode_channel(handle, relative)
    coded = tfc.entropy_encode_finalize(handle).numpy()
  return _with_length(overflow) + coded


def _encode_rows(tables: CodingTables, symbols: np.ndarray, rows: np.ndarray) -> bytes:
  """One stream of `encode` for int32 [n], a row for each."""
  overflow: list[bytes] = []
  exceptions: list[tuple[int, int]] = []
  if tables.num_sure:
    is_coded = rows >= tables.num_sure
    odd = np.flatnonzero(np.greater(symbols != 0, is_coded))
    exceptions += zip(odd.tolist(), symbols[odd].tolist())
    coded = np.flatnonzero(is_coded)
    symbols, rows = symbols.take(coded, mode="clip"), rows.take(coded, mode="clip")
  at = rows.astype(np.intp)  # What `take` would make of them each time.
  relative = symbols - tables.first.take(at, mode="clip")
  _escape(relative, tables.escape.take(at, mode="clip"), overflow)
  with tf.device("/cpu:0"):
    handle = tfc.create_range_encoder([], tables.cdf)
    handle = tfc.entropy_encode_index(handle, rows.astype(np.int32), relative)
    data = tfc.entropy_encode_finalize(handle).numpy()
  return _exceptions_as_bytes(exceptions) + _with_length(overflow) + data


def _escape(relative: np.ndarray, escape: np.ndarray, overflow: list[bytes]) -> None:
  """Escapes what lies outside of the rows, in place; appends to `overflow` how far."""
  outside = relative.view(np.uint32) >= escape.view(np.uint32)  # Negative ones are large there.
  if outside.any():
    escapes = np.broadcast_to(escape, relative.shape)[outside]
    below = relative[outside]
    above = below - escapes
    distance = np.where(above >= 0, 2 * above, -2 * below - 1)
    overflow += [varint(int(d)) for d in distance]
    relative[outside] = escapes


def _with_length(overflow: Sequence[bytes]) -> bytes:
  joined = b"".join(overflow)
  return varint(len(joined)) + joined


def _exceptions_as_bytes(exceptions: Sequence[tuple[int, int]]) -> bytes:
  """Pairs of position and symbol, which is not 0."""
  out, previous = [varint(len(exceptions))], -1
  for position, symbol in exceptions:
    out += [varint(position - previous - 1)]
    out += [varint(2 * symbol - 2 if symbol > 0 else -2 * symbol - 1)]
    previous = position
  return b"".join(out)


def _exceptions(cursor: Cursor, count: int) -> tuple[np.ndarray, np.ndarray]:
  """The inverse of `_exceptions_as_bytes`, for `count` symbols: positions and symbols."""
  number = cursor.varint("number of exceptions")
  if number > min(count, cursor.remaining // 2):
    raise BitstreamError("The section has more exceptions than room for them: damaged or hostile.")
  positions, symbols = np.empty(number, np.int64), np.empty(number, np.int64)
  previous = -1
  for i in range(number):
    previous += 1 + cursor.varint("exception")
    code = cursor.varint("exception")
    positions[i], symbols[i] = previous, -(code + 1) // 2 if code % 2 else code // 2 + 1
  if previous >= count or np.abs(symbols).max(initial=0) > MAX_ABS_SYMBOL:
    raise BitstreamError("An exception of the section is out of range: damaged or hostile.")
  return positions, symbols


def _flat(symbols: np.ndarray) -> np.ndarray:
  """[..., C] as [n, C], C unchanged; no copy."""
  return symbols.reshape(-1, symbols.shape[-1]) if symbols.ndim > 1 else symbols.reshape(1, -1)


def _bands(shape: Sequence[int]) -> list[slice]:
  """The bands of [n, C] that are coded as streams of their own: at least one, of about the same
  size. They also bound what is in memory at once."""
  count = max(1, min(shape[0], -(-shape[0] * shape[1] // _SYMBOLS_A_STREAM)))
  return [slice(i * shape[0] // count, (i + 1) * shape[0] // count) for i in range(count)]


def _in_threads(function: Callable[[_T], _U], arguments: Sequence[_T]) -> list[_U]:
  """function of each argument, on as many threads as TensorFlow's operations have.

  One of them is the caller's: a thread that sleeps while others work takes a while to come back.
  """
  threads = tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count() or 1
  helpers = min(threads, len(arguments)) - 1
  if helpers < 1:
    return [function(argument) for argument in arguments]
  found: dict[int, _U] = {}
  waiting = iter(range(len(arguments)))  # Shared: each is given out once.

  def work() -> None:
    try:
      for index in waiting:
        found[index] = function(arguments[index])
    finally:  # After an error nothing more is given out.
      collections.deque(waiting, maxlen=0)

  others = [_pool(threads - 1).submit(work) for _ in range(helpers)]
  try:
    work()
  finally:  # What has not begun by now has nothing to do.
    begun = [other for other in others if not other.cancel()]
    futures.wait(begun)
  for other in begun:
    other.result()
  return [found[index] for index in range(len(arguments))]


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> futures.ThreadPoolExecutor:
  """Lives as long as the process: a thread's memory is slow when it is first used."""
  return futures.ThreadPoolExecutor(threads, thread_name_prefix="range_coder")


def decode(
  tables: CodingTables, data: bytes, shape: tuple[int, ...], rows: Optional[np.ndarray] = None
) -> np.ndarray:
  """The inverse of `encode`: int32 of `shape`; `rows` as `encode` had them.

  Raises:
    BitstreamError: `data` is too short to hold so many symbols, or is not what `encode` makes.
  """
  count = int(np.prod(shape, dtype=np.int64))
  if rows is None:
    check_room(data, count, count // shape[-1] * float(tables.best_bits.sum()))
  symbols = np.empty(shape, np.int32)
  flat, flat_rows = _flat(symbols), None if rows is None else _flat(rows)
  bands = _bands(flat.shape)
  cursor = Cursor(data)
  sizes = [cursor.varint("stream length") for _ in bands[1:]]
  streams = [cursor.take(size, "stream") for size in sizes] + [cursor.rest()]

  def decode_band(band_and_stream: tuple[slice, bytes]) -> None:
    band, stream = band_and_stream
    if flat_rows is None:
      _decode_channels(tables, stream, flat[band])
    else:
      _decode_rows(tables, stream, flat[band].reshape(-1), flat_rows[band].reshape(-1))

  _in_threads(decode_band, list(zip(bands, streams)))
  return symbols


def _decode_channels(tables: CodingTables, stream: bytes, symbols: np.ndarray) -> None:
  """One stream of `decode`, into `symbols` [n, C]."""
  cursor = Cursor(stream)
  overflow = _overflow(cursor)
  with tf.device("/cpu:0"):
    handle = tfc.create_range_decoder(cursor.rest(), tables.cdf)
    handle, decoded = tfc.entropy_decode_channel(handle, symbols.shape, tf.int32)
    _add(decoded.numpy(), tables.first, tables.escape, overflow, symbols)
    _check_end(handle, overflow)


def _decode_rows(
  tables: CodingTables, stream: bytes, symbols: np.ndarray, rows: np.ndarray
) -> None:
  """One stream of `decode`, into `symbols` [n]."""
  cursor = Cursor(stream)
  positions, exceptions = _exceptions(cursor, len(symbols))
  if np.any(rows[positions] >= tables.num_sure):
    raise BitstreamError("A symbol of the range coder is an exception: damaged or hostile.")
  overflow = _overflow(cursor)
  coded = np.flatnonzero(rows >= tables.num_sure) if tables.num_sure else None
  if coded is not None:
    rows = rows.take(coded, mode="clip")
  at = rows.astype(np.intp)  # What `take` would make of them each time.
  fewest_bits = float(tables.best_bits.take(at, mode="clip").sum())
  check_room(stream, len(symbols), fewest_bits)
  first, escape = tables.first.take(at, mode="clip"), tables.escape.take(at, mode="clip")
  with tf.device("/cpu:0"):
    handle = tfc.create_range_decoder(cursor.rest(), tables.cdf)
    handle, decoded = tfc.entropy_decode_index(handle, rows.astype(np.int32), at.shape, tf.int32)
    if coded is None:
      _add(decoded.numpy(), first, escape, overflow, symbols)
    else:
      values = np.empty_like(first)
      _add(decoded.numpy(), first, escape, overflow, values)
      symbols[...] = 0
      symbols[coded] = values
    _check_end(handle, overflow)
  symbols[positions] = exceptions


def _overflow(cursor: Cursor) -> Cursor:
  return Cursor(cursor.take(cursor.varint("overflow length"), "overflow"))


def _check_end(handle: tf.Tensor, overflow: Cursor) -> None:
  """Raises BitstreamError unless coder and overflow end where they must."""
  if not bool(tfc.entropy_decode_finalize(handle).numpy()):
    raise BitstreamError("The range decoder ends out of step: the section is damaged.")
  if overflow.remaining:
    raise BitstreamError("The section has more overflow values than escapes: damaged or hostile.")


def _add(
  relative: np.ndarray, first: np.ndarray, escape: np.ndarray, overflow: Cursor, out: np.ndarray
) -> None:
  """out = the integers that the coder's symbols stand for; escapes read `overflow`."""
  is_escape = relative == escape
  escaped = is_escape.nonzero() if is_escape.any() else None
  if escaped is not None:
    if len(escaped[0]) > overflow.remaining:
      raise BitstreamError("The section has more escapes than overflow values: damaged or hostile.")
    escapes, beginnings = (np.broadcast_to(v, relative.shape)[escaped] for v in (escape, first))
    values = np.array([overflow.varint("overflow") for _ in escaped[0]], np.int64)
    values = np.where(values % 2, -(values + 1) // 2, escapes.astype(np.int64) + values // 2)
    if np.abs(values + beginnings).max() > MAX_ABS_SYMBOL:
      raise BitstreamError("An overflow value is out of range: damaged or hostile.")
    relative[escaped] = values
  np.add(relative, first, out=out)


def round_around(y: tf.Tensor, centre: np.ndarray) -> np.ndarray:
  """The integers that stand for `y` on the grid around `centre`: round(y - centre), int32."""
  y = np.asarray(y)
  if y.ndim != 4:
    return _round(y - centre)
  symbols = np.empty(y.shape, np.int32)
  for row in range(y.shape[1]):  # Row by row: little else is in memory.
    here = centre if np.ndim(centre) < 4 else centre[:, row]
    symbols[:, row] = _round(y[:, row] - here)
  return symbols


def _round(x: np.ndarray) -> np.ndarray:
  rounded = np.nan_to_num(np.round(x))
  return np.clip(rounded, -MAX_ABS_SYMBOL, MAX_ABS_SYMBOL).astype(np.int32)


def check_room(data: bytes, count: int, fewest_bits: float) -> None:
  """Raises BitstreamError if `data` is too short for `count` symbols of `fewest_bits` in all."""
  if fewest_bits > 8 * len(data) + 64:
    raise BitstreamError(
      f"{len(data)} bytes cannot hold the {count} symbols that the header announces: damaged or "
      "hostile."
    )


def symbols_crc(symbols: np.ndarray, crc: int = 0) -> int:
  """CRC-32 of int32 symbols, chained on `crc`: checks that decoding gave what was encoded."""
  return zlib.crc32(np.ascontiguousarray(symbols, "<i4").data, crc)


class FactorizedPrior(tf.Module):
  """The non-parametric factorized prior: one learned density a channel.

  `tfc.NoisyDeepFactorized` (Ballé et al. 2018, appendix 6.1): a density convolved with the unit
  uniform, so that its value at a grid point is the probability of that quantization bin.
  """

  def __init__(
    self,
    channels: int,
    init_scale: float = 10.0,
    offset_heuristic: bool = True,
    name: Optional[str] = None,
  ):
    """Makes the prior.

    Args:
      channels: Of the latent.
      init_scale: Width of the initial density, in quantization steps.
      offset_heuristic: Whether the grid is shifted to each channel's median (fewer bits), or lies
        on the integers (mixed quantization trains for that).
      name: Of the module.
    """
    super().__init__(name=name)
    self.channels = channels
    self.distribution = tfc.NoisyDeepFactorized(batch_shape=(channels,), init_scale=init_scale)
    self._offset_heuristic = offset_heuristic
    # Derived from the prior, so kept where checkpoints do not look.
    self._derived = types.SimpleNamespace(
      tables=None,
      offset=tf.Variable(tf.zeros([channels]), trainable=False, name="quantization_offset"),
    )

  @property
  def offset(self) -> tf.Tensor:
    """[channels] float32 in -0.5..0.5: the grid is the integers plus this. 0 before `prepare`."""
    return tf.convert_to_tensor(self._derived.offset)

  @property
  def tables(self) -> CodingTables:
    """The coding tables; `prepare` builds them."""
    if self._derived.tables is None:
      raise RuntimeError("No coding tables yet: call prepare() after building or restoring.")
    return self._derived.tables

  def bits(self, y: tf.Tensor) -> tf.Tensor:
    """-log2 of the likelihood. `y`: [B, h, w, channels] float32. Returns [B] float32.

    `self.distribution.log_prob` with one evaluation of the density network at both edges of a bin
    in place of four. For the sigmoid s and logits u > l at the edges,
    s(u) - s(l) = s(u) s(-l) (1 - exp(l - u)), without cancellation wherever they are.
    """
    batch = tf.shape(y)[0]
    x = tf.transpose(tf.reshape(y, [-1, self.channels]))[:, None]  # [channels, 1, n]
    lower, upper = tf.split(self._logits(tf.concat([x - 0.5, x + 0.5], axis=2)), 2, axis=2)
    log_inside = tf.math.log(-tf.math.expm1(lower - upper))
    log_prob = tf.math.log_sigmoid(upper) + tf.math.log_sigmoid(-lower) + log_inside
    return tf.reduce_sum(tf.reshape(log_prob, [self.channels, batch, -1]), [0, 2]) / -np.log(2.0)

  def prepare(self) -> None:
    """Builds the quantization offset and the coding tables from the prior as it is now."""
    self.use(self.derive())

  def derive(self) -> dict[str, np.ndarray]:
    """The quantization offset and the coding tables of the prior as it is now."""
    logits = self._logits_float64()
    median = _solve(logits, 0.0, self.channels)
    offset = (median - np.round(median)) if self._offset_heuristic else np.zeros(self.channels)
    # Multiples of 2^-OFFSET_BITS: exact in fixed point, and no worse as a heuristic.
    offset = np.round(offset * 2**OFFSET_BITS) / 2**OFFSET_BITS
    tail = np.log(_TAIL_MASS / 2) - np.log1p(-_TAIL_MASS / 2)
    lower = np.floor(_solve(logits, tail, self.channels) - offset).astype(np.int64)
    upper = np.ceil(_solve(logits, -tail, self.channels) - offset).astype(np.int64)
    half = _MAX_SYMBOLS // 2
    middle = np.round(median - offset).astype(np.int64)
    lower = np.clip(lower, middle - half, middle)
    upper = np.clip(upper, middle, middle + half)
    grid = lower + np.arange(int((upper - lower).max()) + 1)[:, None] + offset  # [n, channels]
    pmf = _difference(logits(grid - 0.5), logits(grid + 0.5))
    pmfs = [pmf[: hi - lo + 1, c] for c, (lo, hi) in enumerate(zip(lower, upper))]
    return {"offset": offset.astype(np.float32), **make_tables(pmfs, lower).arrays()}

  def use(self, derived: Mapping[str, np.ndarray]) -> None:
    """Sets what `derive` gave, here or on another machine.

    Raises:
      ValueError: It is not of such a prior.
    """
    tables = CodingTables.from_arrays(derived)
    offset = np.asarray(derived["offset"], np.float64)
    if offset.shape != (self.channels,) or len(tables.first) != self.channels:
      raise ValueError(f"The coding tables are not of a prior of {self.channels} channels.")
    with np.errstate(invalid="ignore"):
      on_grid = (offset * 2**OFFSET_BITS) % 1 == 0
    if not np.all(on_grid & (np.abs(offset) <= 0.5)):
      raise ValueError(
        f"The quantization offsets are not multiples of 2^-{OFFSET_BITS} in -0.5..0.5: damaged."
      )
    self._derived.offset.assign(offset.astype(np.float32))
    self._derived.tables = tables

  def calibrate(self, centre: np.ndarray, spread: np.ndarray) -> None:
    """Moves and scales each channel's density to data, before training starts.

    It becomes about a logistic around `centre` with the standard deviation `spread` (at least 0.1
    of a quantization step); each channel's own width spares the training its first thousand steps.

    Args:
      centre: [channels], of the latent in quantization steps.
      spread: [channels].
    """
    variables = self._weights()
    num_layers = len(self.distribution.base.num_filters) + 1
    # Equal weights and factors of 0: the network is then linear, logits = x / scale. The biases
    # keep their random part, which tells the hidden units apart.
    scale = np.sqrt(3.0) / np.pi * np.maximum(spread, 0.1)  # Of a logistic of that deviation.
    per_layer = scale ** (-1.0 / num_layers)
    for i in range(num_layers):
      matrix = variables[f"matrix_{i}"]
      value = np.broadcast_to((per_layer / matrix.shape[1])[:, None, None], matrix.shape)
      matrix.assign(_inverse_softplus(value))
    # The last bias puts the median, where the logit is 0, onto the centre.
    logits = self._logits_float64()(np.asarray(centre, np.float64)[None])[0]
    variables[f"bias_{num_layers - 1}"].assign_sub(logits[:, None, None])

  def stretch(self, factor: float) -> None:
    """Makes each density that of `factor` times the latent."""
    for variable in self.distribution.variables:
      if variable.name.split("/")[-1].startswith("matrix_0"):
        variable.assign(_inverse_softplus(np.logaddexp(0.0, variable.numpy()) / factor))

  def symbols(self, y: tf.Tensor) -> np.ndarray:
    """The integers that stand for `y` [B, h, w, channels]: round(y - offset), int32."""
    return round_around(y, self.offset.numpy())

  def values(self, symbols: np.ndarray) -> tf.Tensor:
    """The inverse of `symbols` up to rounding: symbols + offset, float32."""
    return tf.cast(symbols, tf.float32) + self.offset

  def _weights(self) -> dict[str, tf.Variable]:
    """The density network's, by names such as matrix_0."""
    return {v.name.split("/")[-1].split(":")[0]: v for v in self.distribution.base.variables}

  def _logits(self, hidden: tf.Tensor) -> tf.Tensor:
    """The density network's cumulative logits, [channels, 1, n] -> same."""
    weights = self._weights()
    depth = len(self.distribution.base.num_filters) + 1
    for i in range(depth):
      hidden = tf.linalg.matmul(tf.nn.softplus(weights[f"matrix_{i}"]), hidden)
      hidden += weights[f"bias_{i}"]
      if i < depth - 1:
        hidden += tf.tanh(weights[f"factor_{i}"]) * tf.tanh(hidden)
    return hidden

  def _logits_float64(self):
    """The same as a numpy function: [n, channels] -> same."""
    base = self.distribution.base
    weights = {name: v.numpy().astype(np.float64) for name, v in self._weights().items()}
    depth = len(base.num_filters) + 1

    def logits(x: np.ndarray) -> np.ndarray:
      hidden = x.T[:, None, :]  # [channels, 1, n]
      for i in range(depth):
        matrix = np.logaddexp(0.0, weights[f"matrix_{i}"])
        hidden = matrix @ hidden + weights[f"bias_{i}"]
        if i < depth - 1:
          hidden = hidden + np.tanh(weights[f"factor_{i}"]) * np.tanh(hidden)
      return hidden[:, 0, :].T

    return logits


class GaussianConditional:
  """Normal densities with a mean and a scale of their own for each symbol, for a hyperprior.

  Ballé et al. 2018 (arXiv 1802.01436), Minnen et al. 2018 (arXiv 1809.02736): the density
  convolved with the unit uniform. The grid is the integers plus the mean, so coding sees integers
  and one of NUM_SCALES tables.
  """

  def __init__(self) -> None:
    """Has no weights; its tables are the same everywhere."""
    self._tables: Optional[CodingTables] = None

  def bits(self, y: tf.Tensor, mean: tf.Tensor, log_scale: tf.Tensor) -> tf.Tensor:
    """-log2 of the likelihood; all [B, h, w, C] float32. Returns [B] float32.

    Scales beyond the tables' count as the tables' first or last; gradients that lead back into the
    range pass.
    """
    log_scale = tfc.lower_bound(log_scale, LOG_SCALE_MIN)
    log_scale = tfc.upper_bound(log_scale, LOG_SCALE_MIN + (NUM_SCALES - 1) * LOG_SCALE_STEP)
    return tf.reduce_sum(_noisy_normal(y - mean, log_scale), axis=[1, 2, 3]) / -np.log(2.0)

  @property
  def tables(self) -> CodingTables:
    """One row a scale."""
    if self._tables is None:
      self._tables = gaussian_tables()
    return self._tables

  def use(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets tables that were made elsewhere.

    Raises:
      ValueError: They are no such tables.
    """
    tables = CodingTables.from_arrays(arrays)
    if len(tables.first) != NUM_SCALES:
      raise ValueError(f"{len(tables.first)} rows; a Gaussian conditional has {NUM_SCALES}.")
    self._tables = tables


@tf.custom_gradient
def _noisy_normal(x: tf.Tensor, log_scale: tf.Tensor):
  """Log density at x of normal plus unit uniform noise; the normal's mean is 0, its scale > 0.1.

  `tfc.NoisyNormal(0, exp(log_scale)).log_prob(x)` with 2 error functions, not 8, and a fifth
  of the time: saves 2.8% of a step of jpegl.
  """
  precision = tf.exp(-log_scale) * math.sqrt(0.5)
  distance = tf.abs(x)  # Taken to the left of the mean, where the distribution function is small.
  upper, lower = (0.5 - distance) * precision, (-0.5 - distance) * precision
  log_upper, slope_upper = _log_normal_cdf(upper)
  log_lower, slope_lower = _log_normal_cdf(lower)
  log_outside = log_lower - log_upper
  inside = -tf.math.expm1(log_outside)  # The bin's part of all that lies below `upper`.

  def grad(dy: tf.Tensor):
    dy = dy / inside
    by_upper, by_lower = slope_upper(), slope_lower() * tf.exp(log_outside)
    dx = dy * tf.sign(x) * (by_lower - by_upper) * precision
    return dx, dy * (by_lower * lower - by_upper * upper)

  return log_upper + tf.math.log(inside), grad


def _log_normal_cdf(w: tf.Tensor) -> tuple[tf.Tensor, Callable[[], tf.Tensor]]:
  """log(erfc(-w) / 2) for w < 3.5, and a function that gives its derivative.

  Below -7, where erfc comes near the smallest float32: three terms of the asymptotic series.
  """
  near = w > -math.sqrt(50)
  square = tf.square(w)
  r = tf.math.reciprocal(tf.minimum(w, -math.sqrt(50)))
  q = 0.5 * tf.square(r)
  series = r * (q * (1.0 - q * (3.0 - 15.0 * q)) - 1.0) * (0.5 / math.sqrt(math.pi))
  value = tf.where(near, 0.5 * tf.math.erfc(-w), series)  # If not near, without exp(-w^2).
  zero = tf.zeros_like(w)

  def derivative() -> tf.Tensor:
    return tf.exp(tf.where(near, -square, zero)) / (value * math.sqrt(math.pi))

  return tf.math.log(value) - tf.where(near, zero, square), derivative


@functools.lru_cache(maxsize=1)
def gaussian_tables() -> CodingTables:
  """Row i: the zero-mean normal of log scale LOG_SCALE_MIN + i * LOG_SCALE_STEP, in unit bins."""
  pmfs, first = [], []
  for i in range(NUM_SCALES):
    scale = math.exp(LOG_SCALE_MIN + i * LOG_SCALE_STEP)
    reach = max(1, math.ceil(scale * _TAIL_DEVIATIONS))
    # Survival function at the right edges of bins 0, 1, ...: no cancellation in the tail.
    beyond = [0.5 * math.erfc((k + 0.5) / scale / math.sqrt(2)) for k in range(reach + 1)]
    half = -np.diff(beyond)
    pmfs.append(np.concatenate([half[::-1], [1 - 2 * beyond[0]], half]))
    first.append(-reach)
  return make_tables(pmfs, np.array(first))


def _difference(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
  """sigmoid(upper) - sigmoid(lower), taken on the side where both are small: no cancellation."""
  sign = np.where(lower + upper > 0, -1.0, 1.0)
  return np.abs(_sigmoid(sign * upper) - _sigmoid(sign * lower))


def _inverse_softplus(y: np.ndarray) -> np.ndarray:
  return y + np.log(-np.expm1(-y))


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return np.exp(-np.logaddexp(0.0, -x))


def _solve(logits, target: float, channels: int) -> np.ndarray:
  """x [channels] with logits(x) = target, by bisection; logits increase in x."""
  low, high = np.full(channels, -1.0), np.full(channels, 1.0)
  for _ in range(24):
    low = np.where(logits(low[None])[0] > target, 2 * low, low)
    high = np.where(logits(high[None])[0] < target, 2 * high, high)
  for _ in range(60):
    middle = (low + high) / 2
    below = logits(middle[None])[0] < target
    low, high = np.where(below, middle, low), np.where(below, high, middle)
  return (low + high) / 2
