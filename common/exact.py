"""Convolutions in integers: the same numbers on every machine, whatever the order of summation.

A decoder that reads symbols with tables chosen by a network must compute that network exactly as
the encoder did; one rounding more or less anywhere, and all that follows is noise (Ballé, Johnston
and Minnen 2019, "Integer networks for data compression with latent-variable models").
Floating-point convolutions depend on the number of threads, the library and the processor.

Here kernels and activations are integers, and no sum of products, in any order, reaches what the
format that it is held in can hold exactly. So addition is associative, and whatever multiplies and
adds these integers, blocked or fused in any way, gives the same result.

- The first layer, small and with inputs of many bits, runs in float64 (sums below 2^52).
- The others run in float32, at its speed: activations have 11 bits, and the input channels are
  divided into groups, so that the sum of a group stays within 2^24; the sums of the groups are
  added as int32.

Channels have scales of their own, by the sizes of the weights that lead to them. On top of those,
each image's activations after a layer are scaled by the power of 2 that makes them fill their bits:
it follows from integers alone, so that every machine chooses the same. What exceeds the widest
scale is clipped. Rounding to the next layer's activations is exact too: to the nearest, halves up.
docs/results.md has what all that costs in bytes. It runs on the CPU, next to the range coder.
"""

import abc
import math
from collections.abc import Mapping
from typing import Optional

import numpy as np
import tensorflow as tf

from common.layers import Conv2D, Conv2DTranspose, Layer, Sequential

FRACTION_BITS = 10  # Of inputs and outputs.
_ACTIVATION_BITS = 22  # Integers within -2^22..2^22, numbers within -4096..4096.
_SUM_BITS = 52  # In float64: no partial sum exceeds 2^52.
_MAX_KERNEL_BITS = 28  # Fractional bits of the first layer's kernel: 0 to so many.

_HIDDEN_MAX = 2047  # Activations between layers: integers of at most this absolute value.
_FINEST = 12  # An image's activations have up to so many more fractional bits.
_HIDDEN_RANGE = 1  # Bits for activations above what weights lead to expect, at the coarsest.
_MAX_BITS = 60  # Fractional bits of channels and sums: within so many, of either sign.
_GROUP_TAPS = 150  # Products that one float32 sum has, about.
_GROUP_SUM = 1 << 24  # In float32: no partial sum exceeds it.
_INT32_SUM = 1 << 30  # What the sums of all groups stay below.
_BIAS_SUM = 1 << 50  # In float64: what biases stay below.


class ExactTransform:
  """An integer copy of a stack of `Conv2D` and `Conv2DTranspose` with ReLU or no activation.

  Inputs and outputs are integers, numbers times 2^FRACTION_BITS, in tensors on the CPU.
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
    self._name = name
    last = len(layers) - 1
    self._layers: list[_ExactLayer] = [
      (_GroupedLayer if i else _WideLayer)(layer, f"{name}/{i}", i == last)
      for i, layer in enumerate(layers)
    ]
    self._function = tf.function(
      self._run,
      input_signature=[tf.TensorSpec([None, None, None, layers[0].in_channels], tf.float64)],
      autograph=False,
    )

  def derive(
    self, gain: Optional[np.ndarray] = None, shift: Optional[np.ndarray] = None
  ) -> dict[str, np.ndarray]:
    """Integer kernels of the stack as it is now.

    Args:
      gain: [out_channels], multiplies the outputs; exactly known numbers.
      shift: [out_channels], is added to them then.

    Raises:
      ValueError: Weights are not finite or too large.
    """
    arrays: dict[str, np.ndarray] = {}
    size, fraction = np.ones(self._layers[0].layer.in_channels), np.array(FRACTION_BITS)
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
    checked = [layer.checked(arrays) for layer in self._layers]
    with tf.device("/cpu:0"):
      for layer, own in zip(self._layers, checked):
        layer.assign(own)

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    """x: [B, h, w, in_channels] integers in float64. Returns the outputs' integers in int32."""
    if not self._layers[0].is_ready:
      raise RuntimeError("No integer kernels yet: call prepare() after building or restoring.")
    with tf.device("/cpu:0"):
      return self._function(x)

  def _run(self, x: tf.Tensor) -> tf.Tensor:
    limit = 2.0**_ACTIVATION_BITS
    with tf.device("/cpu:0"):
      x = tf.clip_by_value(x, -limit, limit)
      finer = tf.zeros([tf.shape(x)[0], 1, 1, 1], tf.int32)
      for layer in self._layers:
        x, finer = layer.run(x, finer)
      return x


class _ExactLayer(abc.ABC):
  """One layer in integers. Arrays:

  - `kernel`: numbers times 2^bits; in further layers times 2^-out of the input channel, too.
  - `bias`: numbers times 2^bits, in the first layer times 2^FRACTION_BITS, in others times
    2^_FINEST, too.
  - `bits`: of the kernel; in further layers each output channel has its own.
  - `out`: [out_channels], fractional bits of the outputs.
  """

  bits_shape = ""  # Or "out": the output channels.

  def __init__(self, layer: Layer, name: str, is_last: bool):
    self.layer = layer
    self.name = name
    self.is_last = is_last
    self.is_ready = False
    self._variables: dict[str, tf.Variable] = {}

  @abc.abstractmethod
  def derive(
    self, kernel: np.ndarray, bias: np.ndarray, fraction: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Its arrays but `out`; inputs have `fraction` fractional bits (a number, or [in])."""

  @abc.abstractmethod
  def is_exact(self, arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether no sum can be rounded."""

  @abc.abstractmethod
  def assign(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets what `checked` gave."""

  @abc.abstractmethod
  def run(self, x: tf.Tensor, finer: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The layer's integers, and by how many bits each image's are finer; both of the inputs."""

  def weights(
    self, gain: Optional[np.ndarray], shift: Optional[np.ndarray]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias in float64; gain and shift are for the last layer."""
    kernel = self.layer.kernel.numpy().astype(np.float64)
    bias = np.zeros(self.layer.out_channels)
    if self.layer.use_bias:
      bias += self.layer.bias.numpy()
    if self.is_last:
      kernel = kernel * (1.0 if gain is None else gain)
      bias = bias * (1.0 if gain is None else gain) + (0.0 if shift is None else shift)
    if not np.all(np.isfinite(kernel)) or not np.all(np.isfinite(bias)):
      raise ValueError(
        f"The weights of {self.layer.name} are not finite: use an earlier checkpoint."
      )
    return kernel, bias

  def checked(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """This layer's arrays in int64.

    Raises:
      ValueError, KeyError: They are of another layer, or sums could become inexact.
    """
    shapes = {"kernel": tuple(self.layer.kernel.shape), "out": (self.layer.out_channels,)}
    shapes |= {"bias": shapes["out"], "bits": shapes["out"] if self.bits_shape else ()}
    found = {}
    for key, shape in shapes.items():
      array = np.asarray(arrays[f"{self.name}/{key}"])
      if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
          f"{self.name}/{key} is {array.dtype} {list(array.shape)}; this model has integers "
          f"{list(shape)} there."
        )
      found[key] = array.astype(np.int64)
    in_range = all(np.abs(found[k].astype(np.float64)).max() <= _MAX_BITS for k in ("bits", "out"))
    if not in_range or not self.is_exact(found):
      raise ValueError(f"{self.name}: sums of these integers would be rounded: damaged.")
    return found

  def fraction_out(self, size: np.ndarray) -> np.ndarray:
    """[out] int32, fractional bits of the outputs, given what size weights lead to expect."""
    if self.is_last:
      return np.full(self.layer.out_channels, FRACTION_BITS, np.int32)
    exponents = np.frexp(np.where(size > 0, size, 1.0))[1]
    return np.clip(-exponents - _HIDDEN_RANGE, -_MAX_BITS, _MAX_BITS).astype(np.int32)

  def outputs(self, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """From exact numbers times 2^out, in float64: integers, and by how many bits they are finer."""
    low = 0.0 if self.layer.activation is not None else -1.0
    if self.is_last:
      limit = 2.0**_ACTIVATION_BITS
      x = tf.clip_by_value(tf.floor(sums + 0.5), low * limit, limit)
      return tf.cast(x, tf.int32), tf.zeros([tf.shape(x)[0], 1, 1, 1], tf.int32)
    most = tf.reduce_max(sums if low == 0.0 else tf.abs(sums), axis=[1, 2, 3], keepdims=True)
    # Comparisons, not logarithms, which machines round differently.
    fits = [most * 2.0**k <= _HIDDEN_MAX for k in range(1, _FINEST + 1)]
    finer = tf.add_n([tf.cast(f, tf.int32) for f in fits])
    x = tf.floor(sums * _power_of_2(finer) + 0.5)
    x = tf.clip_by_value(x, low * _HIDDEN_MAX, float(_HIDDEN_MAX))
    return tf.cast(x, tf.float32), finer

  def variable(self, name: str, value: np.ndarray, dtype: tf.DType) -> None:
    """Sets a variable, and makes it the first time."""
    if name not in self._variables:
      self._variables[name] = tf.Variable(value, trainable=False, dtype=dtype)
    self._variables[name].assign(value)

  def tensor(self, name: str) -> tf.Tensor:
    """A variable's value."""
    return tf.convert_to_tensor(self._variables[name])

  def _too_large(self, kernel: np.ndarray, bias: np.ndarray) -> ValueError:
    total = float(np.abs(kernel).sum(axis=(0, 1, 2)).max())
    return ValueError(
      f"The weights of {self.layer.name} are too large for exact coding (sums of {total:.3g}, "
      f"biases of {np.abs(bias).max():.3g}): the training has diverged?"
    )


class _WideLayer(_ExactLayer):
  """The first layer, in float64: its inputs have FRACTION_BITS fractional bits."""

  def derive(
    self, kernel: np.ndarray, bias: np.ndarray, fraction: np.ndarray
  ) -> dict[str, np.ndarray]:
    """As many fractional bits of the kernel as keep every sum exact."""
    for bits in range(_MAX_KERNEL_BITS, -1, -1):
      arrays = {
        "kernel": np.round(kernel * 2.0**bits),
        "bias": np.round(bias * 2.0 ** (bits + fraction)),
        "bits": np.array(bits, np.int32),
      }
      if self.is_exact(arrays):
        arrays["kernel"] = arrays["kernel"].astype(np.int32)
        arrays["bias"] = arrays["bias"].astype(np.int64)
        return arrays
    raise self._too_large(kernel, bias)

  def is_exact(self, arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether all partial sums of integer activations, kernel and bias stay within 2^_SUM_BITS."""
    kernel, bias = (np.abs(arrays[key].astype(np.float64)) for key in ("kernel", "bias"))
    largest = kernel.sum(axis=(0, 1, 2)).max() * 2.0**_ACTIVATION_BITS
    return bool(
      kernel.max() < 2**31
      and largest + bias.max() <= 2.0**_SUM_BITS
      and 0 <= arrays["bits"] <= _MAX_KERNEL_BITS
    )

  def assign(self, arrays: Mapping[str, np.ndarray]) -> None:
    """See `_ExactLayer.assign`."""
    self.variable("kernel", _as_run(arrays["kernel"], self.layer), tf.float64)
    self.variable("bias", arrays["bias"], tf.float64)
    self.variable("factor", 2.0 ** (arrays["out"] - arrays["bits"] - FRACTION_BITS), tf.float64)
    self.is_ready = True

  def run(self, x: tf.Tensor, finer: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """See `_ExactLayer.run`."""
    sums = _convolve(x, self.tensor("kernel"), self.layer) + self.tensor("bias")
    return self.outputs(sums * self.tensor("factor"))


class _GroupedLayer(_ExactLayer):
  """A further layer, in float32: groups of input channels, whose sums are added as int32."""

  bits_shape = "out"

  def __init__(self, layer: Layer, name: str, is_last: bool):
    super().__init__(layer, name, is_last)
    products = math.ceil(layer.kernel_size / layer.upsample) ** 2 * layer.in_channels
    most = _INT32_SUM // _GROUP_SUM
    count = min(layer.in_channels, math.ceil(products / _GROUP_TAPS), most)
    edges = [i * layer.in_channels // count for i in range(count + 1)]
    self._sizes = [int(size) for size in np.diff(edges)]

  def derive(
    self, kernel: np.ndarray, bias: np.ndarray, fraction: np.ndarray
  ) -> dict[str, np.ndarray]:
    """For each output channel as many bits as keep its sums exact."""
    kernel = kernel * 2.0 ** -fraction.astype(np.float64)[:, None]
    with np.errstate(divide="ignore"):
      bits = np.minimum(
        np.log2(_GROUP_SUM / _HIDDEN_MAX / self._largest_sums(kernel)),
        np.log2(_BIAS_SUM / 2**_FINEST / np.abs(bias)),
      )
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
      raise self._too_large(kernel, bias)
    types = {"kernel": np.int32, "bias": np.int64, "bits": np.int32}
    return {key: array.astype(types[key]) for key, array in arrays.items()}

  def _largest_sums(self, kernel: np.ndarray) -> np.ndarray:
    """[out], what a group's sum can be at most for activations within -1..1."""
    taps = np.abs(kernel.astype(np.float64))
    step = self.layer.upsample  # Only so many of a transposed convolution's taps meet.
    phases = [taps[i::step, j::step].sum(axis=(0, 1)) for i in range(step) for j in range(step)]
    sums = np.stack(phases)  # [phases, in, out]
    begins = np.cumsum([0, *self._sizes[:-1]])
    return np.add.reduceat(sums, begins, axis=1).max(axis=(0, 1))

  def _are_rounded(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """[out], whether sums can be."""
    largest = self._largest_sums(arrays["kernel"]) * _HIDDEN_MAX
    return (largest > _GROUP_SUM) | (np.abs(arrays["bias"].astype(np.float64)) > _BIAS_SUM)

  def is_exact(self, arrays: Mapping[str, np.ndarray]) -> bool:
    """See `_ExactLayer.is_exact`."""
    return not self._are_rounded(arrays).any()

  def assign(self, arrays: Mapping[str, np.ndarray]) -> None:
    """See `_ExactLayer.assign`."""
    kernel = _as_run(arrays["kernel"], self.layer)
    axis = 3 if isinstance(self.layer, Conv2DTranspose) and self.layer.stride > 1 else 2
    for i, part in enumerate(np.split(kernel, np.cumsum(self._sizes)[:-1], axis)):
      self.variable(f"kernel{i}", part, tf.float32)
    factor = 2.0 ** (arrays["out"] - arrays["bits"])
    self.variable("factor", factor, tf.float64)
    self.variable("bias", arrays["bias"] * (factor / 2**_FINEST), tf.float64)  # Exact as well.
    self.is_ready = True

  def run(self, x: tf.Tensor, finer: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """See `_ExactLayer.run`."""
    total = None
    for i, part in enumerate(tf.split(x, self._sizes, -1)):
      # One group after the other: all at once would take memory for the sums of each.
      with tf.control_dependencies([] if total is None else [total]):
        sums = tf.cast(_convolve(part, self.tensor(f"kernel{i}"), self.layer), tf.int32)
      total = sums if total is None else total + sums
    total = tf.cast(total, tf.float64)
    # Products with powers of 2, and sums of less than 2^53 of the smallest step: none is rounded.
    return self.outputs(total * (self.tensor("factor") * _power_of_2(-finer)) + self.tensor("bias"))


def _power_of_2(exponent: tf.Tensor) -> tf.Tensor:
  """float64, exact: from a table, for -_FINEST.._FINEST."""
  return tf.gather(tf.constant(2.0 ** np.arange(-_FINEST, _FINEST + 1)), exponent + _FINEST)


def _as_run(kernel: np.ndarray, layer: Layer) -> np.ndarray:
  """A layer's kernel [k, k, in, out] as `_convolve` wants it."""
  if isinstance(layer, Conv2D):
    return kernel
  # A transposed convolution of stride 1 is a convolution with the kernel turned round.
  return kernel[::-1, ::-1] if layer.stride == 1 else kernel.transpose(0, 1, 3, 2)


def _convolve(x: tf.Tensor, kernel: tf.Tensor, layer: Layer) -> tf.Tensor:
  """The convolution of `Conv2D` or `Conv2DTranspose` (see `common.layers`), without its bias."""
  size, stride, origin = layer.kernel_size, layer.stride, layer.origin
  shape = tf.shape(x)
  if isinstance(layer, Conv2DTranspose) and stride > 1:
    after = max(0, size - stride - origin)
    height, width = stride * shape[1], stride * shape[2]
    whole = [shape[0], height + origin + after, width + origin + after, layer.out_channels]
    y = tf.nn.conv2d_transpose(x, kernel, whole, stride, "VALID")
    return tf.slice(y, [0, origin, origin, 0], [shape[0], height, width, layer.out_channels])
  before = origin if isinstance(layer, Conv2D) else size - 1 - origin
  padding = [before, size - 1 - before]
  padded = tf.pad(x, [[0, 0], padding, padding, [0, 0]])
  # At most stride - 1 of the padding is not needed; VALID leaves it.
  y = tf.nn.conv2d(padded, kernel, stride, "VALID")
  height, width = (-(-shape[i] // stride) for i in (1, 2))
  return tf.slice(y, [0, 0, 0, 0], [shape[0], height, width, layer.out_channels])
