"""Initial kernels that make a stack of strided convolutions compute a block DCT.

A short training then starts from JPEG's transform with a larger block, not from noise. Each layer
of stride s maps s x s neighbouring block DCTs onto the DCT of the joint block: all of that is
linear and exact, so strides of 4, 2, 2 (or 2, 8, or 16) give the 16x16 DCT of the three colour
planes (in an orthonormal opponent basis), cut to its lowest frequencies, one a channel.
Analysis and synthesis meet in the latents alone: their layers need not mirror each other.

What lies between the convolutions starts as (nearly) the identity: GDN does with a small gamma; a
leaky ReLU passes a signal as the difference of two channels, leaky(x) - leaky(-x) = (1 + leak) x;
residual and attention branches start at zero.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np
import tensorflow as tf

from common.layers import GDN, Conv2D, Conv2DTranspose, Layer, Pointwise, Sequential, leak_of
from common.transforms_elic import Attention, ResidualBottleneck
from common.transforms_shallow import ActivatedPlusLinear, AppendOnes

INITS = ("random", "dct")
_ATTENTION_GAIN = 1.5  # x + x * sigmoid(0).


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


def check(init: str) -> None:
  """Raises ValueError if `init` is no name of initial values."""
  if init not in INITS:
    raise ValueError(f"Unknown model_config.init {init!r}. Known: {', '.join(INITS)}.")


def step(rd_lambda: float) -> float:
  """The quantization step, for pixels in 0..255, that suits a loss of bpp + rd_lambda * MSE.

  At high rate it minimises bits + rd_lambda * step^2 / 12 for three coefficients a pixel, whose
  error is averaged over three channels.
  """
  return math.sqrt(18 / math.log(2) / rd_lambda)


def initialise(
  analysis: Layer, synthesis: Layer, step: float, noise: float = 0.1, seed: int = 0
) -> None:
  """Gives the convolutions of an analysis and of its synthesis DCT kernels.

  Args:
    analysis: Of `Conv2D` layers on images, with what may lie between (top of this file).
    synthesis: Of `Conv2DTranspose` layers; the products of the strides are equal.
    step: Quantization step of the coefficients, for pixels in 0..255: the latents are integers at
      multiples of it.
    noise: Standard deviation of the noise that breaks symmetries, relative to 1 / sqrt(fan in).
    seed: Of the noise.

  Raises:
    ValueError: The transforms have other layers, or kernels that do not cover their strides.
  """
  gain = 255.0 / step
  for transform, convolution, factor in (
    (analysis, Conv2D, gain),
    (synthesis, Conv2DTranspose, 1 / gain),
  ):
    is_analysis = convolution is Conv2D
    random = np.random.default_rng(seed if is_analysis else seed + 1)
    links = _links(transform, convolution)
    _initialise(links, is_analysis, synthesis.in_channels, factor, noise, random)


class _Link:
  """One convolution, and what follows it in the direction of the signal.

  Attributes:
    conv: Its kernel is set.
    offset: Its first output channel that carries the signal; the channels before it start at zero.
    channels: How many of its outputs can carry it.
    leak: The slope below zero of a ReLU that follows; None for none.
    gain_before, gain_after: What attention around it multiplies the signal with.
  """

  def __init__(self, conv: Layer, offset: int, channels: int):
    self.conv, self.offset, self.channels = conv, offset, channels
    self.leak: Optional[float] = None
    self.gain_before, self.gain_after = 1.0, 1.0


def _links(transform: Layer, convolution: type) -> list[_Link]:
  """The transform's convolutions, image side first; branches beside them become zero."""
  links: list[_Link] = []
  gain = 1.0
  for layer in transform.layers if isinstance(transform, Sequential) else [transform]:
    if isinstance(layer, convolution) and getattr(layer, "activation", None) is None:
      links.append(_Link(layer, 0, layer.out_channels))
    elif isinstance(layer, ActivatedPlusLinear) and convolution is Conv2DTranspose:
      hidden = layer.out_channels
      links.append(_Link(layer.convolution, 0 if layer.linear else hidden, hidden))
      if layer.linear is not None:
        pointwise = layer.linear.layers[0]
        pointwise.kernel.assign(tf.zeros_like(pointwise.kernel))
    elif isinstance(layer, Pointwise) and links and leak_of(layer.activation) is not None:
      links[-1].leak = leak_of(layer.activation)
    elif isinstance(layer, ResidualBottleneck):
      _zero_branch(layer)
    elif isinstance(layer, Attention):
      for block in [*layer.trunk.layers, *layer.mask.layers[:-1]]:
        _zero_branch(block)
      out = layer.mask.layers[-1]
      out.kernel.assign(tf.zeros_like(out.kernel))
      if links:
        links[-1].gain_after *= _ATTENTION_GAIN
      else:
        gain *= _ATTENTION_GAIN
    elif not isinstance(layer, (GDN, AppendOnes)):
      raise ValueError(
        f'init="dct" does not know {type(layer).__name__}: it takes {convolution.__name__} without '
        "activation, GDN, (leaky) ReLU layers, ELIC's blocks and the shallow decoders' layers."
      )
  if not links:
    raise ValueError(f'init="dct" needs a transform of {convolution.__name__} layers.')
  links[0].gain_before = gain
  return links if convolution is Conv2D else links[::-1]


def _zero_branch(block: ResidualBottleneck) -> None:
  expand = block.branch.layers[-1]
  expand.kernel.assign(tf.zeros_like(expand.kernel))


def _initialise(
  links: Sequence[_Link],
  is_analysis: bool,
  num_latents: int,
  gain: float,
  noise: float,
  random: np.random.Generator,
) -> None:
  """Sets the kernels of `_links`; `gain` multiplies the last one's."""
  block, before, fine_leak = 1, [Frequency(c, 0, 0) for c in range(3)], None
  for i, link in enumerate(links):
    conv = link.conv
    if conv.origin + conv.stride > conv.kernel_size:
      raise ValueError(
        f'init="dct": a kernel of {conv.kernel_size} taps from {-conv.origin} on does not cover a '
        f"stride of {conv.stride}."
      )
    # Between this link and the next: as many frequencies as there are channels, or pairs of them.
    is_last = i + 1 == len(links)
    writer = link if is_analysis else None if is_last else links[i + 1]
    room = num_latents if writer is None else writer.channels
    coarse_leak = None if writer is None else writer.leak
    after = frequencies(block * conv.stride, room // (1 if coarse_leak is None else 2))
    merge = _merge(before, after, block, conv.stride)  # [stride, stride, before, after]
    if i == 0:
      merge = np.einsum("abco,cd->abdo", merge, dct_matrix(3))
    merge = _in_pairs(merge, 2, fine_leak, reads=is_analysis)
    merge = _in_pairs(merge, 3, coarse_leak, reads=not is_analysis)
    if is_last:
      merge = merge * gain
    merge = merge / (link.gain_before * link.gain_after)
    if not is_analysis:
      merge = merge.transpose(0, 1, 3, 2)  # From the latents' side to the image's.
    shape = tuple(conv.kernel.shape)
    kernel = random.normal(0, noise / np.sqrt(np.prod(shape[:3])), shape)
    kernel *= gain if is_last else 1.0
    outputs = slice(link.offset, link.offset + merge.shape[3])
    kernel[:, :, : merge.shape[2], outputs] = 0
    kernel[..., : link.offset] = 0
    covered = slice(conv.origin, conv.origin + conv.stride)
    kernel[covered, covered, : merge.shape[2], outputs] = merge
    conv.kernel.assign(kernel.astype(np.float32))
    block, before, fine_leak = block * conv.stride, after, coarse_leak


def _in_pairs(merge: np.ndarray, axis: int, leak: Optional[float], reads: bool) -> np.ndarray:
  """A signal x on two channels, x and -x, where a leaky ReLU lies between writer and reader."""
  if leak is None:
    return merge
  both = np.concatenate([merge, -merge], axis=axis)
  return both / (1 + leak) if reads else both


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
