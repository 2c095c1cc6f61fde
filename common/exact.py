"""Convolutions in integers: the same numbers on every machine, whatever the order of summation.

A decoder that reads symbols with tables chosen by a network must compute that network exactly as
the encoder did; one rounding more or less anywhere, and all that follows is noise (Ballé, Johnston
and Minnen 2019, "Integer networks for data compression with latent-variable models").
Floating-point convolutions depend on the number of threads, the library and the processor.

Here kernels and activations are integers, and no sum of products, in any order, reaches what the
format that it is held in can hold exactly. So addition is associative, and whatever multiplies and
adds these integers, blocked or fused in any way, gives the same result.

Activations have 8 bits, and kernels 12, in two parts within -64..64 that are convolved alone:
processors multiply and add bytes at several times the rate of floating point. Where TensorFlow has
no such convolution, float64 gives the same numbers.

Channels have scales of their own, by the sizes of the weights that lead to them. On top of those,
each image's activations are scaled by the power of 2 that makes them fill their bits: it follows
from integers alone, so that every machine chooses the same. (Of a picture in tiles, each tile is an
image here: how it is divided is a part of the format.) What exceeds the widest scale is
clipped. Rounding to the next layer's activations is exact too: to the nearest, halves up.
docs/results.md has what all that costs in bytes. It runs on the CPU, next to the range coder.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Callable, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from common.layers import Conv2D, Conv2DTranspose, Layer, Sequential

FRACTION_BITS = 10  # Of outputs, and of what is added to inputs.
_OUTPUT_BITS = 22  # Outputs are integers within -2^22..2^22, numbers within -4096..4096.
_COARSEST = 6  # Inputs are divided by at most 2 to this power, and clipped then.
_UNSIGNED_MAX = 255  # Activations after a ReLU: integers of at most this value.
_SIGNED_MAX = 127  # Others, and inputs: of at most this absolute value.
_FINEST = 15  # An image's activations have up to so many more fractional bits.
_HIDDEN_RANGE = 4  # At the coarsest, what weights lead to expect is 2^-4 of a unit or less.
_MAX_BITS = 60  # Fractional bits of channels and sums: within so many, of either sign.
_KERNEL_MAX = 2047
_LOW_BITS = 5  # Of a kernel's lower part, from -16 on.
_PART_SUM = 1 << 24  # No sum of a part exceeds it: some libraries round what they sum in int32.
_SUM = ((1 << _LOW_BITS) - 1) * _PART_SUM  # Nor does a sum of both exceed this, in int32.
_BIAS_SUM = 1 << 50  # In float64: what biases stay below.


class ExactTransform:
  """An integer copy of a stack of `Conv2D` and `Conv2DTranspose` with ReLU or no activation.

  Inputs are integers, to which numbers are added, one a channel; outputs are integers, numbers
  times 2^FRACTION_BITS.
  """

  def __init__(self, transform: Layer, name: str):
    """Makes it without kernels; `derive` and `use` give them.

    Args:
      transform: The trained stack.
      name: Prefix of the arrays' names.

    Raises:
      ValueError: The stack has other layers.
    """
    layers = transform.layers if isinstance(transform, Sequential) else [transform]
    for layer in layers:
      activation = getattr(layer, "activation", None)
      if not isinstance(layer, (Conv2D, Conv2DTranspose)) or activation not in (None, tf.nn.relu):
        raise ValueError(
          f"{type(layer).__name__} cannot be computed exactly: exact coding knows Conv2D and "
          "Conv2DTranspose with ReLU or no activation. Choose such a hyper_synthesis, or "
          "exact_coding=False (files then decode only where they were made)."
        )
    self._layers = [
      _ExactLayer(
        layer,
        f"{name}/{i}",
        is_signed=i == 0 or layers[i - 1].activation is None,
        is_last=i + 1 == len(layers),
      )
      for i, layer in enumerate(layers)
    ]
    self._offset_name = f"{name}/offset"
    self._function: Optional[Callable[[tf.Tensor], tf.Tensor]] = None

  def derive(
    self,
    gain: Optional[np.ndarray] = None,
    shift: Optional[np.ndarray] = None,
    offset: Optional[np.ndarray] = None,
  ) -> dict[str, np.ndarray]:
    """Integers for the stack as it is now.

    Args:
      gain: [out_channels], multiplies the outputs; exactly known numbers.
      shift: [out_channels], is added to them then.
      offset: [in_channels], is added to the inputs: within -1..1, multiples of 2^-FRACTION_BITS.

    Raises:
      ValueError: Weights are not finite or too large; the offset is no such multiple.
    """
    channels = self._layers[0].layer.in_channels
    scaled = (np.zeros(channels) if offset is None else offset) * 2.0**FRACTION_BITS
    if np.any(scaled != np.round(scaled)):
      raise ValueError(f"Offsets are multiples of 2^-{FRACTION_BITS}.")
    arrays = {self._offset_name: scaled.astype(np.int16)}
    size, fraction = np.ones(channels), np.zeros(channels)
    for layer in self._layers:
      kernel, bias = layer.weights(gain, shift)
      size = np.sqrt(np.sum((kernel * size[:, None]) ** 2, axis=(0, 1, 2)) + bias**2)
      fraction_out = layer.fraction_out(size)
      derived = layer.derive(kernel, bias, fraction)
      derived["out"] = fraction_out
      arrays.update({f"{layer.name}/{key}": value for key, value in derived.items()})
      fraction = fraction_out
    return arrays

  def use(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets what `derive` gave.

    Raises:
      ValueError, KeyError: It is not of such a stack, or sums could become inexact.
    """
    first = self._layers[0].layer
    offset = _integers(arrays, self._offset_name, (first.in_channels,))
    if np.abs(offset.astype(np.float64)).max() > 1 << FRACTION_BITS:
      raise ValueError(f"{self._offset_name} is not within -1..1: damaged.")
    for own, layer in [(layer.checked(arrays), layer) for layer in self._layers]:
      layer.arrays = own
    # What the offset adds where all the taps lie inside, and beside an edge, is known beforehand.
    added = np.einsum("ijco,c->ijo", self._layers[0].arrays["kernel"], offset)[:, :, None]
    # A new function: the kernels are constants of its graph, which the library lays out once.
    self._function = tf.function(
      lambda x: self._run(x, added),
      input_signature=[tf.TensorSpec([None, None, None, first.in_channels], tf.int32)],
      autograph=False,
    )

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    """x: [B, h, w, in_channels] int32, without the offset. Returns the outputs' integers, int32."""
    if self._function is None:
      raise RuntimeError("No integer kernels yet: call prepare() after building or restoring.")
    with tf.device("/cpu:0"):
      return self._function(x)

  def _run(self, x: tf.Tensor, added: np.ndarray) -> tf.Tensor:
    with tf.device("/cpu:0"):
      ones = tf.ones_like(x[:1, :, :, :1], tf.float64)
      more = _convolve(ones, self._layers[0].layer, added, _floats) * 2.0**-FRACTION_BITS
      x = tf.cast(x, tf.float64)
      size = tf.reduce_max(tf.abs(x), axis=[1, 2, 3], keepdims=True)
      finer = tf.add_n([tf.cast(size <= _SIGNED_MAX * 2.0**k, tf.int32) for k in range(_COARSEST)])
      finer -= _COARSEST
      x = _rounded(x * _power_of_2(finer), -_SIGNED_MAX, _SIGNED_MAX)
      for layer in self._layers:
        x, finer = layer.run(x, finer, more)
        more = tf.zeros([], tf.float64)
      return x


class _ExactLayer:
  """One layer in integers. Arrays:

  - `kernel`: numbers times 2^bits, and times 2^-out of the input channel.
  - `bias`: numbers times 2^bits, and times 2^_FINEST.
  - `bits`: [out_channels], of the kernel.
  - `out`: [out_channels], fractional bits of the outputs.

  Attributes:
    layer: The layer that it copies.
    name: Prefix of its arrays' names.
    arrays: What `use` gave.
  """

  def __init__(self, layer: Layer, name: str, is_signed: bool, is_last: bool):
    """Its copy of `layer`; `is_signed` is of the inputs, `is_last` whether the stack ends."""
    self.layer = layer
    self.name = name
    self.arrays: dict[str, np.ndarray] = {}
    self._is_signed = is_signed
    self._is_last = is_last

  def weights(
    self, gain: Optional[np.ndarray], shift: Optional[np.ndarray]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias in float64; gain and shift are for the last layer."""
    kernel = self.layer.kernel.numpy().astype(np.float64)
    bias = np.zeros(self.layer.out_channels)
    if self.layer.use_bias:
      bias += self.layer.bias.numpy()
    if self._is_last:
      kernel = kernel * (1.0 if gain is None else gain)
      bias = bias * (1.0 if gain is None else gain) + (0.0 if shift is None else shift)
    if not np.all(np.isfinite(kernel)) or not np.all(np.isfinite(bias)):
      raise ValueError(
        f"The weights of {self.layer.name} are not finite: use an earlier checkpoint."
      )
    return kernel, bias

  def fraction_out(self, size: np.ndarray) -> np.ndarray:
    """[out] int32, fractional bits of the outputs, given what size weights lead to expect."""
    if self._is_last:
      return np.full(self.layer.out_channels, FRACTION_BITS, np.int32)
    exponents = np.frexp(np.where(size > 0, size, 1.0))[1]
    return np.clip(-exponents - _HIDDEN_RANGE, -_MAX_BITS, _MAX_BITS).astype(np.int32)

  def derive(
    self, kernel: np.ndarray, bias: np.ndarray, fraction: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Its arrays but `out`; inputs have `fraction` [in] fractional bits.

    For each output channel as many bits as its kernel has room for.
    """
    kernel = kernel * 2.0 ** -fraction.astype(np.float64)[:, None]
    with np.errstate(divide="ignore"):
      bits = np.minimum.reduce([
        np.log2((_KERNEL_MAX + 0.5) / np.abs(kernel).max(axis=(0, 1, 2))),
        np.log2(_SUM / _UNSIGNED_MAX / self._largest_sums(kernel)),
        np.log2(_BIAS_SUM / 2**_FINEST / np.abs(bias)),
      ])  # fmt: skip
    bits = np.clip(np.floor(bits), -_MAX_BITS, _MAX_BITS)
    while True:
      arrays = {
        "kernel": np.round(kernel * 2.0**bits),
        "bias": np.round(bias * 2.0 ** (bits + _FINEST)),
        "bits": bits,
      }
      rounded = self._are_rounded(arrays)
      if not rounded.any():
        break
      bits -= rounded  # Rounding took some of them over the bound.
    if bits.min() < -_MAX_BITS:
      total = float(np.abs(kernel).sum(axis=(0, 1, 2)).max())
      raise ValueError(
        f"The weights of {self.layer.name} are too large for exact coding (sums of {total:.3g}, "
        f"biases of {np.abs(bias).max():.3g}): the training has diverged?"
      )
    types = {"kernel": np.int16, "bias": np.int64, "bits": np.int32}
    return {key: array.astype(types[key]) for key, array in arrays.items()}

  def checked(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """This layer's arrays.

    Raises:
      ValueError, KeyError: They are of another layer, or sums could become inexact.
    """
    channels = (self.layer.out_channels,)
    shapes = {"kernel": tuple(self.layer.kernel.shape)}
    shapes |= {"bias": channels, "bits": channels, "out": channels}
    found = {k: _integers(arrays, f"{self.name}/{k}", shape) for k, shape in shapes.items()}
    in_range = all(np.abs(found[k].astype(np.float64)).max() <= _MAX_BITS for k in ("bits", "out"))
    if not in_range or self._are_rounded(found).any():
      raise ValueError(f"{self.name}: sums of these integers would be rounded: damaged.")
    return {**found, "kernel": found["kernel"].astype(np.int16)}

  def _largest_sums(self, kernel: np.ndarray) -> np.ndarray:
    """[out], what a sum can be at most for activations within -1..1."""
    taps = np.abs(kernel.astype(np.float64))
    step = self.layer.upsample  # Only so many of a transposed convolution's taps meet.
    phases = [taps[i::step, j::step].sum((0, 1, 2)) for i in range(step) for j in range(step)]
    return np.max(phases, axis=0)

  def _are_rounded(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """[out], whether sums can be, or kernels have more bits."""
    kernel, bias = (np.abs(arrays[key].astype(np.float64)) for key in ("kernel", "bias"))
    too_large = (kernel.max((0, 1, 2)) > _KERNEL_MAX) | (bias > _BIAS_SUM)
    return too_large | (self._largest_sums(kernel) * _UNSIGNED_MAX > _SUM)

  def runs_in_bytes(self) -> bool:
    """Whether it does with these arrays; else it runs in float64, which gives the same.

    It does not where thousands of taps are so chosen that one part's sums are large.
    """
    # Inputs with a sign are bytes as well, from 1 to 255.
    sums = [self._largest_sums(part) for part in _parts(self.arrays["kernel"])]
    return bool(np.max(sums) * _UNSIGNED_MAX <= _PART_SUM) and multiplies_bytes()

  def run(self, x: tf.Tensor, finer: tf.Tensor, more: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The layer's integers, in int32 or float64, and by how many bits each image's are finer.

    Args:
      x: Integers.
      finer: [B, 1, 1, 1] int32, by how many bits they are finer.
      more: Is added to the sums, at the scale of inputs that are finer by 0 bits.
    """
    kernel = self.arrays["kernel"]
    if self.runs_in_bytes():
      zero = 128 if self._is_signed else 0
      sums = _convolve(tf.cast(x + zero, tf.uint8), self.layer, kernel, _bytes, zero)
      total = tf.cast(sums, tf.float64)
    else:
      total = _convolve(tf.cast(x, tf.float64), self.layer, kernel, _floats)
    # Products with powers of 2, and sums of less than 2^53 of the smallest step: none is rounded.
    factor = 2.0 ** (self.arrays["out"] - self.arrays["bits"])
    bias = self.arrays["bias"] * (factor / 2**_FINEST)
    return self._outputs(total * (factor * _power_of_2(-finer)) + (more * factor + bias))

  def _outputs(self, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """From exact numbers times 2^out, in float64: what `run` returns."""
    low = 0 if self.layer.activation is not None else -1
    if self._is_last:
      limit = 1 << _OUTPUT_BITS
      return _rounded(sums, low * limit, limit), tf.zeros([tf.shape(sums)[0], 1, 1, 1], tf.int32)
    limit = _SIGNED_MAX if low else _UNSIGNED_MAX
    most = tf.reduce_max(tf.abs(sums) if low else sums, axis=[1, 2, 3], keepdims=True)
    # Comparisons, not logarithms, which machines round differently.
    fits = [most * 2.0**k <= limit for k in range(1, _FINEST + 1)]
    finer = tf.add_n([tf.cast(f, tf.int32) for f in fits])
    return _rounded(sums * _power_of_2(finer), low * limit, limit), finer


def _integers(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
  """One of the arrays, in int64.

  Raises:
    ValueError, KeyError: It is missing, or of other numbers.
  """
  array = np.asarray(arrays[name])
  if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
    raise ValueError(
      f"{name} is {array.dtype} {list(array.shape)}; this model has integers {list(shape)} there."
    )
  return array.astype(np.int64)


def _rounded(x: tf.Tensor, low: int, high: int) -> tf.Tensor:
  """float64 to int32, halves up, within low..high."""
  return tf.cast(tf.clip_by_value(tf.floor(x + 0.5), float(low), float(high)), tf.int32)


def _parts(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """low within -16..15 and high within -64..64, with kernel = low + 2^_LOW_BITS high."""
  half = 1 << (_LOW_BITS - 1)
  high = (kernel + half) >> _LOW_BITS
  return kernel - (high << _LOW_BITS), high


def _power_of_2(exponent: tf.Tensor) -> tf.Tensor:
  """float64, exact: from a table, for -_FINEST.._FINEST."""
  return tf.gather(tf.constant(2.0 ** np.arange(-_FINEST, _FINEST + 1)), exponent + _FINEST)


# (x [B,h,w,in], kernel [i,j,in,out], stride, zero) -> the correlation of x - zero without padding.
_Correlation = Callable[[tf.Tensor, np.ndarray, int, int], tf.Tensor]


def _floats(x: tf.Tensor, kernel: np.ndarray, stride: int, zero: int = 0) -> tf.Tensor:
  """In float64; `zero` is 0."""
  del zero
  return tf.nn.conv2d(x, kernel.astype(np.float64), stride, "VALID")


def _bytes(x: tf.Tensor, kernel: np.ndarray, stride: int, zero: int = 0) -> tf.Tensor:
  """Of bytes, to int32. Within a graph only, whose constants the kernel's parts become."""
  low, high = (_bytes_of_part(x, part, stride) for part in _parts(kernel))
  sums = low + high * (1 << _LOW_BITS)
  return sums - (zero * kernel.sum((0, 1, 2))).astype(np.int32) if zero else sums


def _bytes_of_part(x: tf.Tensor, part: np.ndarray, stride: int) -> tf.Tensor:
  # The ranges say that the integers stand for themselves.
  sums, _, _ = tf.raw_ops.QuantizedConv2D(
    input=tf.bitcast(x, tf.quint8),
    filter=tf.constant(part.astype(np.int8).view(tf.qint8.as_numpy_dtype)),
    min_input=0.0,
    max_input=255.0,
    min_filter=-127.0,
    max_filter=127.0,
    strides=[1, stride, stride, 1],
    padding="VALID",
    out_type=tf.qint32,
  )
  return tf.bitcast(sums, tf.int32)


@functools.lru_cache(maxsize=1)
def multiplies_bytes() -> bool:
  """Whether TensorFlow convolves bytes here, and gives the right sums up to 2^24.

  It does where oneDNN is on (TF_ENABLE_ONEDNN_OPTS, by default on x86). Processors that add pairs
  of products in 16 bits do so without overflow, for the parts of kernels are at most 64.
  """
  x = np.full([1, 3, 3, 113], _UNSIGNED_MAX, np.uint8)
  kernel = np.full([3, 3, 113, 32], _KERNEL_MAX)
  kernel[..., 1::4] *= -1
  kernel[..., 2::4] -= np.arange(113)[:, None] % 3
  kernel[..., 3::4] -= np.random.default_rng(0).integers(0, 2 * _KERNEL_MAX, [3, 3, 113, 8])
  try:
    with tf.init_scope(), tf.device("/cpu:0"):
      sums = tf.function(lambda x: _bytes(x, kernel, 1), autograph=False)(tf.constant(x)).numpy()
  except tf.errors.OpError:
    return False
  return bool(np.array_equal(sums.reshape(-1), kernel.sum((0, 1, 2)) * _UNSIGNED_MAX))


class _Phase(NamedTuple):
  """Every stride-th output along one axis: the taps that they have, and the input of the first."""

  taps: Sequence[int]
  begin: int


def _phases(layer: Layer) -> list[_Phase]:
  """Of a layer's outputs, along either axis. Taps are in the order of the inputs that they meet."""
  if isinstance(layer, Conv2D):
    return [_Phase(range(layer.kernel_size), -layer.origin)]
  found = []
  for phase in range(layer.stride):
    place = phase + layer.origin  # Output + origin - stride * input is the tap.
    taps = range(place % layer.stride, layer.kernel_size, layer.stride)
    found.append(_Phase(taps[::-1], place // layer.stride - len(taps) + 1))
  return found


def _convolve(
  x: tf.Tensor, layer: Layer, kernel: np.ndarray, correlate: _Correlation, zero: int = 0
) -> tf.Tensor:
  """The convolution of `Conv2D` or `Conv2DTranspose` (see `common.layers`), without its bias.

  `zero` is what stands for 0 in x. A transposed one is a convolution for each phase of its outputs,
  and those interleaved.
  """
  shape = tf.shape(x)
  down, phases = layer.downsample, _phases(layer)
  size = [-(-shape[i] // down) for i in (1, 2)]  # Of each phase.
  before = max(0, *(-p.begin for p in phases))
  ends = max(p.begin + len(p.taps) for p in phases) - 1
  after = [tf.maximum(0, ends + down * (n - 1) + 1 - shape[i]) for i, n in zip((1, 2), size)]
  padded = tf.pad(x, [[0, 0], *([before, a] for a in after), [0, 0]], constant_values=zero)

  def run(rows: _Phase, columns: _Phase) -> tf.Tensor:
    if not rows.taps or not columns.taps:
      return None
    begin = [0, before + rows.begin, before + columns.begin, 0]
    across = [down * (n - 1) + len(p.taps) for n, p in zip(size, (rows, columns))]
    part = tf.slice(padded, begin, [shape[0], *across, kernel.shape[2]])
    return correlate(part, kernel[np.ix_(rows.taps, columns.taps)], down, zero)

  found = [[run(rows, columns) for columns in phases] for rows in phases]
  if len(phases) == 1:
    return found[0][0]
  zeros = tf.zeros_like(next(y for row in found for y in row if y is not None))
  joined = tf.stack(
    [tf.stack([zeros if y is None else y for y in row], axis=3) for row in found], axis=2
  )
  return tf.reshape(joined, [shape[0], *(len(phases) * n for n in size), kernel.shape[3]])
