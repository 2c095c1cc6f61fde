"""What quantized coefficients cost in a JPEG file: rate models for training, and their best choice.

`RunLengthRate` counts as the format codes: each nonzero coefficient of a block, in zigzag order,
costs the code of (zeros before it, its size) and its size in bits; one code ends the block. Its
code lengths are learned; a file's own optimised Huffman codes come close. `FrequencyRate` is a
density a frequency, which is smooth but knows nothing of runs.

Blocks are [B, h, w, 64] in zigzag order; table 0 is luminance, 1 chrominance.
"""

import abc
import math

import numpy as np
import tensorflow as tf

NUM_SIZES = 11  # Sizes 0..10 of AC coefficients: |r| < 2^10 in 8-bit pictures.
NUM_DC_SIZES = 12
_NUM_SYMBOLS = 162  # 16 runs x 10 sizes, end of block, sixteen zeros.
_END, _ZEROS = 160, 161
_LN2 = math.log(2.0)
_FAR = 1e9  # More bits than anything costs.
_STRIP = 16
_POSITIONS = np.arange(1, 64, dtype=np.float32)


class Rate(tf.Module, abc.ABC):
  """Bits of quantized blocks."""

  @abc.abstractmethod
  def bits(self, blocks: tf.Tensor, table: int, steps: tf.Tensor) -> tf.Tensor:
    """Bits of each image, [B]. Differentiable in the blocks and in the model's variables.

    Args:
      blocks: [B, h, w, 64], coefficients divided by their steps; integers, or relaxed.
      table: 0 luminance, 1 chrominance.
      steps: [64], what they were divided by.
    """

  @abc.abstractmethod
  def fit(self, blocks: np.ndarray, table: int, steps: np.ndarray) -> None:
    """Sets the variables to what rounded blocks, [B, h, w, 64] float32, suggest."""


def dc_differences(blocks: tf.Tensor) -> tf.Tensor:
  """First coefficients less those of the block before, row by row: [B, h, w, 64] to [B, h * w]."""
  dc = tf.reshape(blocks[..., 0], [tf.shape(blocks)[0], -1])
  return dc - tf.pad(dc[:, :-1], [[0, 0], [1, 0]])


def sizes_of(magnitude: tf.Tensor) -> tf.Tensor:
  """How many bits a magnitude (a whole number, float) has: int32; 0 for 0."""
  return tf.cast(tf.math.ceil(tf.math.log(magnitude + 1.0) / _LN2 - 1e-4), tf.int32)


def _code_lengths(logits: tf.Tensor) -> tf.Tensor:
  """Bits of each symbol, as a Huffman code has them but for the rounding to whole numbers.

  No code word is shorter than a bit: a symbol that is likelier than 1/2 costs one, and the others
  share the other half. (The end of a chrominance block is such a symbol at most rates.)
  """
  log_p = tf.nn.log_softmax(logits)
  most = tf.reduce_max(log_p)
  rest = tf.math.log(0.5) - tf.math.log1p(-tf.exp(tf.minimum(most, -1e-4)))
  lengths = tf.where(log_p < most, -(log_p + rest), math.log(2.0))
  return tf.where(most > math.log(0.5), lengths, -log_p) / _LN2


def _exclusive_max(x: tf.Tensor) -> tf.Tensor:
  """Of each position, the largest value before it along the last axis; 0 where there is none."""
  x = tf.pad(x, [[0, 0], [1, 0]])[:, :-1]
  shift = 1
  while shift < x.shape[1]:
    x = tf.maximum(x, tf.pad(x, [[0, 0], [shift, 0]])[:, : x.shape[1]])
    shift *= 2
  return x


class RunLengthRate(Rate):
  """The format's own run-length code with learned code lengths.

  Attributes:
    ac_logits: [2, 162], of (run, size) as 10 * run + size - 1, end of block, sixteen zeros.
    dc_logits: [2, 12], of the sizes of differences.
  """

  def __init__(self) -> None:
    """Starts with lengths that prefer short runs and small sizes; `fit` gives better ones."""
    super().__init__(name="run_length_rate")
    run, size = np.meshgrid(np.arange(16), np.arange(1, 11), indexing="ij")
    ac = np.concatenate([(-0.3 * run - 0.9 * size).ravel(), [0.0, -4.0]])
    dc = -0.3 * np.abs(np.arange(NUM_DC_SIZES) - 3.0)
    self.ac_logits = tf.Variable(np.stack([ac, ac]), dtype=tf.float32, name="ac_logits")
    self.dc_logits = tf.Variable(np.stack([dc, dc]), dtype=tf.float32, name="dc_logits")

  def lengths(self, table: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(AC [64 runs, 11 sizes] with the size's own bits and those of long runs, end of block [],
    DC [12] with the size's own bits). Size 0 of AC costs more than anything."""
    ac = _code_lengths(self.ac_logits[table])
    short = tf.reshape(ac[:_END], [16, 10]) + np.arange(1, 11, dtype=np.float32)
    runs = np.arange(64)
    full = tf.gather(short, runs % 16) + ac[_ZEROS] * (runs // 16)[:, None].astype(np.float32)
    full = tf.concat([tf.fill([64, 1], _FAR), full], axis=1)
    dc = _code_lengths(self.dc_logits[table])
    return full, ac[_END], dc + np.arange(NUM_DC_SIZES, dtype=np.float32)

  def bits(self, blocks: tf.Tensor, table: int, steps: tf.Tensor) -> tf.Tensor:
    """See `Rate`. The value is that of rounded blocks.

    The gradient in a value is what the next whole number away from zero costs more than the one
    below: that of the line between them.
    """
    del steps
    batch = tf.shape(blocks)[0]
    flat = tf.reshape(blocks, [-1, 64])
    ac, slope = self._ac_bits(flat[:, 1:], table)
    ac = ac + tf.reduce_sum(_zero_with_slope(flat[:, 1:], slope), axis=1)
    return tf.reduce_sum(tf.reshape(ac, [batch, -1]), axis=1) + self._dc_bits(blocks, table)

  def _ac_bits(self, values: tf.Tensor, table: int) -> tuple[tf.Tensor, tf.Tensor]:
    """(bits of each block [N], slope of each value [N, 63]) for values [N, 63]."""
    full, end, _ = self.lengths(table)
    table_of = tf.reshape(full, [-1])

    def cost(run: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
      return tf.gather(table_of, tf.cast(run, tf.int32) * NUM_SIZES + size)

    magnitude = tf.minimum(tf.abs(tf.stop_gradient(values)), 2.0 ** (NUM_SIZES - 1) - 1)
    rounded = tf.round(magnitude)
    nonzero = rounded > 0.5
    size = sizes_of(rounded)
    position = tf.constant(_POSITIONS)
    before = position - 1 - _exclusive_max(tf.where(nonzero, position, 0.0))
    own = tf.where(nonzero, cost(before, size), 0.0)
    last = tf.reduce_max(tf.where(nonzero, position, 0.0), axis=1)
    bits = tf.reduce_sum(own, axis=1) + tf.where(last < 63, end, 0.0)
    # The next nonzero one and its size, in one number: 16 (64 - position) + size, 0 for none.
    coded = tf.where(nonzero, 16.0 * (64.0 - position) + tf.cast(size, tf.float32), 0.0)
    following = _exclusive_max(coded[:, ::-1])[:, ::-1]
    there = following > 0.5
    next_position = 64.0 - tf.floor(following / 16.0)
    next_size = tf.where(there, tf.cast(following, tf.int32) % 16, 1)
    after = tf.where(there, next_position - position - 1, 0.0)
    ended = tf.where(position < 63, end, 0.0)
    next_if_coded = tf.where(there, cost(after, next_size), ended)
    next_if_zero = tf.where(there, cost(tf.minimum(before + after + 1, 63.0), next_size), end)
    low = tf.floor(magnitude)
    if_high = cost(before, tf.minimum(sizes_of(low + 1.0), NUM_SIZES - 1)) + next_if_coded
    if_low = tf.where(low > 0.5, cost(before, sizes_of(low)) + next_if_coded, next_if_zero)
    return bits, tf.sign(values) * (if_high - if_low)

  def _dc_bits(self, blocks: tf.Tensor, table: int) -> tf.Tensor:
    lengths = self.lengths(table)[2]
    difference = dc_differences(blocks)
    rounded = tf.abs(dc_differences(tf.stop_gradient(tf.round(blocks))))
    size = tf.minimum(sizes_of(rounded), NUM_DC_SIZES - 1)
    bits = tf.gather(lengths, size)
    more = tf.gather(lengths, tf.minimum(size + 1, NUM_DC_SIZES - 1))
    # About a size costs `more - bits`, and sizes grow with log2.
    slope = tf.maximum(more - bits, 0.0) / ((1.0 + rounded) * _LN2)
    slope *= tf.sign(tf.stop_gradient(difference))
    return tf.reduce_sum(bits + _zero_with_slope(difference, slope), axis=1)

  def fit(self, blocks: np.ndarray, table: int, steps: np.ndarray) -> None:
    """See `Rate`: code lengths of these blocks' symbols, each counted once more."""
    del steps
    ac, dc = symbol_counts(blocks)
    for variable, counts in ((self.ac_logits, ac), (self.dc_logits, dc)):
      value = variable.numpy()
      value[table] = np.log((counts + 1.0) / (counts.sum() + len(counts)))
      variable.assign(value)

  def choose(self, blocks: tf.Tensor, table: int, steps: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """The integers that minimise bits + weight * squared error, block by block.

    The AC coefficients of a block are chosen jointly, over all runs of zeros (a trellis); each is
    its rounded magnitude, one less, or 0. First coefficients are rounded.

    Args:
      blocks: [B, h, w, 64], coefficients divided by `steps`.
      table: 0 luminance, 1 chrominance.
      steps: [64].
      weight: Bits that a squared error of 1 in a coefficient (not divided) is worth.

    Returns:
      Whole numbers, the blocks' shape; no gradient.
    """
    full, end, _ = (tf.stop_gradient(t) for t in self.lengths(table))
    square = weight * tf.square(tf.stop_gradient(steps))
    flat = tf.reshape(tf.stop_gradient(blocks), [-1, 64])
    return tf.reshape(_choose(flat, tf.transpose(full), end, square), tf.shape(blocks))


@tf.function(
  input_signature=[tf.TensorSpec(shape) for shape in ([None, 64], [NUM_SIZES, 64], [], [64])]
)
def _choose(flat: tf.Tensor, by_size: tf.Tensor, end: tf.Tensor, square: tf.Tensor) -> tf.Tensor:
  """`RunLengthRate.choose` of blocks [N, 64]; one trace serves all callers.

  Args:
    flat: Divided coefficients.
    by_size: [11 sizes, 64 runs], bits of a coefficient.
    end: Bits of the end of a block.
    square: [64], bits that a squared error of 1 in a divided coefficient is worth.
  """
  magnitude = tf.minimum(tf.abs(flat), 2.0 ** (NUM_SIZES - 1) - 1)
  upper = tf.round(magnitude)
  zero_error = square * tf.square(magnitude)
  # The rounded magnitude, and one less. Size 0 costs so much that 0 is never one of these.
  candidates = []
  for value in (upper, tf.maximum(upper - 1.0, 0.0)):
    candidates.append((value, sizes_of(value), square * tf.square(magnitude - value)))
  # Of a block whose last value is at position p: its least cost, less the errors that zeros
  # would make up to p. So the zeros of a run need not be summed.
  ahead = tf.zeros_like(flat[:, :1])
  pointers = tf.TensorArray(tf.int32, 64)
  values = tf.TensorArray(tf.float32, 64)
  runs = tf.pad(by_size, [[0, 0], [0, 1]], constant_values=_FAR)  # The last: p is not before k.
  for begin in range(0, 64, _STRIP):
    width = begin + _STRIP  # In strips, as only positions before k count.
    ahead = tf.pad(ahead, [[0, 0], [0, width - ahead.shape[1]]], constant_values=_FAR)
    column = tf.range(width)

    def step(k, ahead, pointers, values, column=column):
      rows = tf.gather(runs, tf.where(column < k, k - 1 - column, 64), axis=1)
      costs, at, found = [], [], []
      for value, size, error in candidates:
        total = ahead + tf.gather(rows, size[:, k])
        costs.append(tf.reduce_min(total, axis=1) + error[:, k])
        at.append(tf.argmin(total, axis=1, output_type=tf.int32))
        found.append(value[:, k])
      less = costs[1] < costs[0]
      best = tf.where(less, costs[1], costs[0]) - zero_error[:, k]
      pointers = pointers.write(k, tf.where(less, at[1], at[0]))
      values = values.write(k, tf.where(less, found[1], found[0]))
      return k + 1, tf.where(column == k, best[:, None], ahead), pointers, values

    _, ahead, pointers, values = tf.while_loop(
      lambda k, *_, width=width: k < width,
      step,
      (tf.constant(max(begin, 1)), ahead, pointers, values),
      parallel_iterations=1,
    )
  ends = tf.concat([tf.fill([63], end), [0.0]], axis=0)
  last = tf.argmin(ahead + ends, axis=1, output_type=tf.int32)
  chosen = tf.TensorArray(tf.float32, 64)

  def back(k, current, chosen):
    here = tf.equal(current, k)
    chosen = chosen.write(k, tf.where(here, values.read(k), 0.0))
    return k - 1, tf.where(here, pointers.read(k), current), chosen

  _, _, chosen = tf.while_loop(
    lambda k, *_: k > 0, back, (tf.constant(63), last, chosen), parallel_iterations=1
  )
  chosen = chosen.write(0, tf.abs(tf.round(flat[:, 0])))
  return tf.transpose(chosen.stack()) * tf.sign(flat)


@tf.custom_gradient
def _zero_with_slope(x: tf.Tensor, slope: tf.Tensor):
  """0, with the gradient `slope` in x."""
  return tf.zeros_like(x), lambda dy: (dy * slope, None)


def symbol_counts(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """How often each symbol is coded: AC [162] and DC [12], of whole numbers [B, h, w, 64]."""
  rounded = np.round(np.asarray(blocks)).astype(np.int64)
  dc = rounded[..., 0].reshape(len(rounded), -1)
  difference = np.abs(np.diff(dc, axis=1, prepend=0))
  dc_counts = np.bincount(_sizes(difference).ravel(), minlength=NUM_DC_SIZES)[:NUM_DC_SIZES]
  flat = np.abs(rounded.reshape(-1, 64))
  index, position = np.nonzero(flat[:, 1:])
  position += 1
  size = np.minimum(_sizes(flat[index, position]), NUM_SIZES - 1)
  same_block = np.diff(index, prepend=-1) == 0
  run = position - 1 - np.where(same_block, np.roll(position, 1), 0)
  ac_counts = np.bincount(10 * (run % 16) + size - 1, minlength=_NUM_SYMBOLS)
  ac_counts[_ZEROS] = np.sum(run // 16)
  ac_counts[_END] = len(flat) - np.sum(position == 63)
  return ac_counts.astype(np.float64), dc_counts.astype(np.float64)


def _sizes(magnitude: np.ndarray) -> np.ndarray:
  return np.ceil(np.log2(magnitude + 1.0) - 1e-9).astype(np.int64)


_NUM_PARTS = 3


class FrequencyRate(Rate):
  """Each frequency's coefficients are drawn from a mixture of Laplacians around 0, independently.

  The densities are of coefficients before the division, so that they stay right where a table
  moves. First coefficients are differences to the block before, as in the format.

  Attributes:
    log_scales: [2, 64, 3], of the parts.
    weight_logits: [2, 64, 3].
  """

  def __init__(self) -> None:
    """Starts with scales that fall with the frequency; `fit` gives better ones."""
    super().__init__(name="frequency_rate")
    scales = 100.0 / (1.0 + np.arange(64))[:, None] * np.array([0.2, 1.0, 4.0])
    both = np.stack([scales, 0.5 * scales])
    self.log_scales = tf.Variable(np.log(both), dtype=tf.float32, name="log_scales")
    self.weight_logits = tf.Variable(tf.zeros([2, 64, _NUM_PARTS]), name="weight_logits")

  def bits(self, blocks: tf.Tensor, table: int, steps: tf.Tensor) -> tf.Tensor:
    """See `Rate`. Of values with uniform noise: the density of their sum."""
    batch = tf.shape(blocks)[0]
    values = tf.reshape(blocks, [batch, -1, 64])
    dc = dc_differences(blocks)[..., None]
    values = tf.abs(tf.concat([dc, values[..., 1:]], axis=-1))
    scales = tf.exp(self.log_scales[table]) / steps[:, None]
    scales = tf.maximum(scales, 1e-3)
    weights = tf.nn.softmax(self.weight_logits[table])
    likelihood = tf.zeros_like(values)
    for part in range(_NUM_PARTS):
      likelihood += weights[:, part] * _laplace(values, scales[:, part])
    return -tf.reduce_sum(tf.math.log(likelihood + 1e-9), axis=[1, 2]) / _LN2

  def fit(self, blocks: np.ndarray, table: int, steps: np.ndarray) -> None:
    """See `Rate`: scales around the mean magnitudes."""
    values = np.array(np.round(blocks), np.float64).reshape(len(blocks), -1, 64)
    values[..., 0] = np.diff(values[..., 0], axis=1, prepend=0)
    mean = np.maximum(np.mean(np.abs(values), axis=(0, 1)), 0.02) * steps
    variable = self.log_scales.numpy()
    variable[table] = np.log(mean[:, None] * np.array([0.3, 1.0, 4.0]))
    self.log_scales.assign(variable)


def _laplace(magnitude: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
  """Probability of [v - 1/2, v + 1/2] under a Laplacian around 0, for magnitudes of v."""
  beyond = tf.maximum(magnitude - 0.5, 0.0)
  tail = 0.5 * tf.exp(-beyond / scale) * (1.0 - tf.exp(-1.0 / scale))
  inside = tf.minimum(magnitude, 0.5)
  middle = 1.0 - 0.5 * (tf.exp((inside - 0.5) / scale) + tf.exp(-(inside + 0.5) / scale))
  return tf.where(magnitude < 0.5, middle, tail)


RATES = {"runs": RunLengthRate, "frequency": FrequencyRate}


def make_rate(name: str) -> Rate:
  """The rate model called `name`.

  Raises:
    ValueError: There is none; the message lists those that exist.
  """
  if name not in RATES:
    raise ValueError(f"Unknown rate model {name!r}. Known: {', '.join(sorted(RATES))}.")
  return RATES[name]()
