"""Latents on a finer or coarser grid: weights of one rate as the start of another.

A codec that was trained for one lambda is a better start for another lambda when its latents are
multiplied first: at high rates the quantization step that suits a loss of bits + lambda * MSE goes
with 1 / sqrt(lambda) (see `dct_init.step`). The last layer of what makes latents and the first of
what takes them are linear, so their kernels can absorb the factor: without rounding, the picture
that comes back stays the same.
"""

from typing import Any

import numpy as np

from common.layers import Conv2D, Conv2DTranspose, Layer, Sequential
from common.transforms_shallow import ActivatedPlusLinear, AppendOnes


def factor(from_lambda: float, to_lambda: float) -> float:
  """What to multiply latents with that were trained for `from_lambda`."""
  return float(np.sqrt(to_lambda / from_lambda))


def multiply_outputs(transform: Layer, factors: np.ndarray) -> None:
  """Multiplies what a transform gives with `factors` [out_channels].

  Raises:
    ValueError: It does not end with a convolution without activation.
  """
  layers = _layers(transform)
  last = layers[-1]
  if not isinstance(last, (Conv2D, Conv2DTranspose)) or last.activation is not None:
    raise _unknown(transform, "end")
  last.kernel.assign(last.kernel * np.asarray(factors, np.float32))
  if last.use_bias:
    last.bias.assign(last.bias * np.asarray(factors, np.float32))


def divide_inputs(transform: Layer, divisor: float) -> None:
  """Makes a transform give for divisor * y what it gave for y.

  Raises:
    ValueError: It does not begin with a convolution.
  """
  layers = _layers(transform)
  begins_with_ones = isinstance(layers[0], AppendOnes)
  first = layers[1] if begins_with_ones else layers[0]
  if isinstance(first, ActivatedPlusLinear):
    kernels = [first.convolution.kernel]
    if first.linear is not None:
      kernels.append(first.linear.layers[0].kernel)
  elif isinstance(first, (Conv2D, Conv2DTranspose)):
    kernels = [first.kernel]
  else:
    raise _unknown(transform, "begin")
  for kernel in kernels:
    divisors = np.full([kernel.shape[2], 1], divisor, np.float32)
    if begins_with_ones:
      divisors[-1] = 1.0
    kernel.assign(kernel / divisors)


def shift_outputs(transform: Layer, shifts: np.ndarray) -> None:
  """Adds `shifts` [out_channels] to what a transform gives; it must end with a bias.

  Raises:
    ValueError: It does not.
  """
  last = _layers(transform)[-1]
  if not getattr(last, "use_bias", False) or getattr(last, "activation", None) is not None:
    raise _unknown(transform, "end")
  last.bias.assign(last.bias + np.asarray(shifts, np.float32))


def _layers(transform: Layer) -> list[Any]:
  return list(transform.layers) if isinstance(transform, Sequential) else [transform]


def _unknown(transform: Layer, where: str) -> ValueError:
  return ValueError(
    f"{type(transform).__name__} does not {where} with a convolution that could absorb the factor: "
    "set train_eval_config.warm_start_rescale=False."
  )
