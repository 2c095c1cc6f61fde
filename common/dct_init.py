"""Initial kernels that make a stack of strided convolutions compute a block DCT.

A short training then starts from JPEG's transform with a larger block, not from noise. Each layer
of stride s maps s x s neighbouring block DCTs onto the DCT of the joint block: all of that is
linear and exact, so the stack of strides 4, 2, 2 is the 16x16 DCT of the three colour planes (in
an orthonormal opponent basis), cut to as many of its lowest frequencies as there are channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.layers import Conv2D, Conv2DTranspose
from common.transforms import Sequential


class Frequency(NamedTuple):
  """One channel of a block DCT: colour plane and vertical, horizontal frequency."""

  colour: int
  v: int
  u: int


def dct_matrix(size: int) -> np.ndarray:
  """The orthonormal DCT-II, float64 [frequency, position]."""
  n = np.arange(size)
  matrix = np.sqrt(2.0 / size) * np.cos(np.pi * (2 * n[None, :] + 1) * n[:, None] / (2 * size))
  matrix[0] /= np.sqrt(2.0)
  return matrix


def frequencies(block: int, count: int) -> list[Frequency]:
  """The `count` most useful frequencies of a block DCT of three colours, most useful first.

  The order is that of the expected variance, about 1 / (1 + u + v)^2 in luminance and a tenth of
  it in chrominance. Fewer are given where block^2 x 3 < count.
  """
  cost = [
    ((1.0 + v + u) ** 2 * (1.0 if c == 0 else 10.0), Frequency(c, v, u))
    for c in range(3)
    for v in range(block)
    for u in range(block)
  ]
  return [f for _, f in sorted(cost)[:count]]


def initialise(
  analysis: Sequential, synthesis: Sequential, step: float, noise: float = 0.1, seed: int = 0
) -> None:
  """Gives the convolutions of an analysis and its mirrored synthesis DCT kernels.

  Args:
    analysis: With `Conv2D` layers of odd kernels, each of 2 * stride - 1 taps at least.
    synthesis: With `Conv2DTranspose` layers of the same strides, kernels and channels in reverse.
    step: Quantization step of the coefficients, for pixels in 0..255: the latents are integers at
      multiples of it.
    noise: Standard deviation of the noise that breaks symmetries, relative to 1 / sqrt(fan in).
    seed: Of the noise.

  Raises:
    ValueError: The transforms are no such pair.
  """
  down = [layer for layer in analysis.layers if isinstance(layer, Conv2D)]
  up = [layer for layer in synthesis.layers if isinstance(layer, Conv2DTranspose)]
  shapes = [(c.stride, c.kernel_size, c.in_channels, c.out_channels) for c in down]
  mirrored = [(c.stride, c.kernel_size, c.out_channels, c.in_channels) for c in reversed(up)]
  if not shapes or shapes != mirrored or shapes[0][2] != 3:
    raise ValueError(
      'init="dct" needs an analysis of Conv2D layers on 3 channels and a synthesis of '
      "Conv2DTranspose layers with the same strides, kernel sizes and channels in reverse; these "
      f"are (stride, kernel, in, out) {shapes} and, reversed, {mirrored}."
    )
  for stride, size, _, _ in shapes:
    if size % 2 == 0 or size < 2 * stride - 1:
      raise ValueError(f'init="dct": a kernel of {size} taps does not cover a stride of {stride}.')
  gain = 255.0 / step
  for layer, kernel in zip(down, _kernels(shapes, gain, noise, seed)):
    layer.kernel.assign(kernel)
  for layer, kernel in zip(reversed(up), _kernels(shapes, 1 / gain, noise, seed + 1)):
    layer.kernel.assign(kernel.transpose(0, 1, 3, 2))


def _kernels(
  shapes: Sequence[tuple[int, int, int, int]], gain: float, noise: float, seed: int
) -> list[np.ndarray]:
  """Kernels [k, k, in, out] of the analysis; `gain` multiplies the last layer's."""
  random = np.random.default_rng(seed)
  kernels, block, before = [], 1, [Frequency(c, 0, 0) for c in range(3)]
  for i, (stride, size, num_in, num_out) in enumerate(shapes):
    after = frequencies(block * stride, num_out)
    spread = noise / np.sqrt(size * size * num_in)
    kernel = random.normal(0, spread, [size, size, num_in, num_out])
    kernel[:, :, : len(before), : len(after)] = 0
    merge = _merge(before, after, block, stride)  # [stride, stride, before, after]
    if i == 0:
      merge = np.einsum("abco,cd->abdo", merge, dct_matrix(3))
    origin = slice(size // 2, size // 2 + stride)
    kernel[origin, origin, : len(before), : len(after)] = merge
    kernels.append(kernel)
    block, before = block * stride, after
  kernels[-1] = kernels[-1] * gain
  return [k.astype(np.float32) for k in kernels]


def _merge(before: list[Frequency], after: list[Frequency], block: int, stride: int) -> np.ndarray:
  """[stride, stride, before, after]: from the DCTs of stride x stride blocks to the joint one."""
  small, large = dct_matrix(block), dct_matrix(block * stride)
  # One dimension: joint frequency F from frequency f of sub-block p.
  line = np.stack(
    [large[:, p * block : (p + 1) * block] @ small.T for p in range(stride)]
  )  # [p, F, f]
  out = np.zeros([stride, stride, len(before), len(after)])
  for i, f in enumerate(before):
    for o, g in enumerate(after):
      if f.colour == g.colour:
        out[:, :, i, o] = np.outer(line[:, g.v, f.v], line[:, g.u, f.u])
  return out
