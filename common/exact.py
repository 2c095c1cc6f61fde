"""Convolutions in integers: the same numbers on every machine, whatever the order of summation.

A decoder that reads symbols with tables chosen by a network must compute that network exactly as
the encoder did; one rounding more or less anywhere, and all that follows is noise (Ballé, Johnston
and Minnen 2019, "Integer networks for data compression with latent-variable models").
Floating-point convolutions depend on the number of threads, the library and the processor.

Here the trained kernels become integers, activations are numbers of FRACTION_BITS fractional bits,
and everything is held in float64. No sum, in any order, reaches 2^53: a float64 holds each partial
sum exactly, so addition is associative, and whatever multiplies and adds these integers, blocked or
fused in any way, gives the same result. Rounding to the next layer's activations is
floor(x * 2^-shift + 1/2), exact too.

With 53 bits to spend, kernels keep as many as the bound leaves (more than 20 where weights are of
usual sizes) and activations 22: the result differs from the float32 network's by about 2^-10
(docs/results.md has what that costs). It runs on the CPU, next
to the range coder.
"""

import math
from collections.abc import Mapping
from typing import Optional

import numpy as np
import tensorflow as tf

from common.layers import Conv2D, Conv2DTranspose, Layer, Sequential

FRACTION_BITS = 10  # Of inputs, activations and outputs.
_ACTIVATION_BITS = 22  # Integers within -2^22..2^22, numbers within -4096..4096.
_SUM_BITS = 52  # No partial sum exceeds 2^52.
_MAX_KERNEL_BITS = 28  # Fractional bits of kernels: 0 to so many.


class ExactTransform:
  """An integer copy of a stack of `Conv2D` and `Conv2DTranspose` with ReLU or no activation.

  Inputs and outputs are integers, numbers times 2^FRACTION_BITS, in float64 tensors on the CPU.
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
    self._name = name
    self._layers: list[tuple[Layer, bool]] = []
    for layer in layers:
      activation = getattr(layer, "activation", None)
      if not isinstance(layer, (Conv2D, Conv2DTranspose)) or activation not in (None, tf.nn.relu):
        raise ValueError(
          f"{type(layer).__name__} cannot be computed exactly: exact coding knows Conv2D and "
          "Conv2DTranspose with ReLU or no activation. Choose such a hyper_synthesis, or "
          "exact_coding=False (files then decode only where they were made)."
        )
      self._layers.append((layer, activation is not None))
    self._kernels: list[tf.Variable] = []
    self._biases: list[tf.Variable] = []
    self._factors: list[tf.Variable] = []
    self._function = tf.function(
      self._run,
      input_signature=[tf.TensorSpec([None, None, None, layers[0].in_channels], tf.float64)],
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
    for i, (layer, _) in enumerate(self._layers):
      kernel = layer.kernel.numpy().astype(np.float64)
      bias = np.zeros(layer.out_channels)
      if layer.use_bias:
        bias += layer.bias.numpy()
      if i + 1 == len(self._layers):
        kernel = kernel * (1.0 if gain is None else gain)
        bias = bias * (1.0 if gain is None else gain) + (0.0 if shift is None else shift)
      bits = _kernel_bits(kernel, bias, layer.name)
      arrays[f"{self._name}/{i}/kernel"] = np.round(kernel * 2.0**bits).astype(np.int32)
      arrays[f"{self._name}/{i}/bias"] = np.round(bias * 2.0 ** (FRACTION_BITS + bits)).astype(
        np.int64
      )
      arrays[f"{self._name}/{i}/bits"] = np.array(bits, np.int32)
    return arrays

  def use(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets what `derive` gave.

    Raises:
      ValueError, KeyError: It is not of such a stack, or sums could become inexact.
    """
    new: dict[str, list[np.ndarray]] = {"kernel": [], "bias": [], "bits": []}
    for i, (layer, _) in enumerate(self._layers):
      for key, shape in (
        ("kernel", layer.kernel.shape),
        ("bias", [layer.out_channels]),
        ("bits", []),
      ):
        array = np.asarray(arrays[f"{self._name}/{i}/{key}"])
        if array.shape != tuple(shape) or not np.issubdtype(array.dtype, np.integer):
          raise ValueError(
            f"{self._name}/{i}/{key} is {array.dtype} {list(array.shape)}; this model has integers "
            f"{list(shape)} there."
          )
        new[key].append(array.astype(np.float64))
      if not _is_exact(new["kernel"][-1], new["bias"][-1]):
        raise ValueError(f"{self._name}/{i}: sums of these integers would be rounded: damaged.")
      if not 0 <= new["bits"][-1] <= _MAX_KERNEL_BITS:
        raise ValueError(f"{self._name}/{i}/bits is {new['bits'][-1]:.0f}: damaged.")
    new["kernel"] = [_as_run(k, layer) for k, (layer, _) in zip(new["kernel"], self._layers)]
    new["bits"] = [2.0**-bits for bits in new["bits"]]
    with tf.device("/cpu:0"):
      for variables, arrays_ in (
        (self._kernels, new["kernel"]),
        (self._biases, new["bias"]),
        (self._factors, new["bits"]),
      ):
        if not variables:
          variables += [tf.Variable(a, trainable=False, dtype=tf.float64) for a in arrays_]
        for variable, array in zip(variables, arrays_):
          variable.assign(array)

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    """x: [B, h, w, in_channels] integers in float64. Returns the outputs' integers, alike."""
    if not self._kernels:
      raise RuntimeError("No integer kernels yet: call prepare() after building or restoring.")
    with tf.device("/cpu:0"):
      return self._function(x)

  def _run(self, x: tf.Tensor) -> tf.Tensor:
    limit = 2.0**_ACTIVATION_BITS
    with tf.device("/cpu:0"):
      x = tf.clip_by_value(x, -limit, limit)
      for (layer, rectifies), kernel, bias, factor in zip(
        self._layers, self._kernels, self._biases, self._factors
      ):
        x = _convolve(x, tf.convert_to_tensor(kernel), layer) + bias
        x = tf.floor(
          x * factor + 0.5
        )  # From FRACTION_BITS + bits fractional bits to FRACTION_BITS.
        x = tf.clip_by_value(x, 0.0 if rectifies else -limit, limit)
      return x


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


def _kernel_bits(kernel: np.ndarray, bias: np.ndarray, name: str) -> int:
  """Fractional bits of a kernel, as many as keep every sum exact."""
  total = _largest_sum(kernel)
  if not math.isfinite(total) or not np.all(np.isfinite(bias)):
    raise ValueError(f"The weights of {name} are not finite: use an earlier checkpoint.")
  for bits in range(_MAX_KERNEL_BITS, -1, -1):
    if _is_exact(np.round(kernel * 2.0**bits), np.round(bias * 2.0 ** (bits + FRACTION_BITS))):
      return bits
  raise ValueError(
    f"The weights of {name} are too large for exact coding (sums of {total:.3g}, biases of "
    f"{np.abs(bias).max():.3g}): the training has diverged?"
  )


def _is_exact(kernel: np.ndarray, bias: np.ndarray) -> bool:
  """Whether all partial sums of integer activations, kernel and bias stay below 2^_SUM_BITS."""
  largest = _largest_sum(kernel) * 2.0**_ACTIVATION_BITS
  return np.abs(kernel).max() < 2**31 and largest + np.abs(bias).max() <= 2.0**_SUM_BITS


def _largest_sum(kernel: np.ndarray) -> float:
  """What an output can be at most for activations within -1..1."""
  return float(np.abs(kernel).sum(axis=(0, 1, 2)).max())
