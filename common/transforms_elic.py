"""ELIC's analysis and synthesis (He et al. 2022, arXiv 2203.10886), and the blocks in them.

The variant without its context model's parts: 5x5 convolutions of stride 2, three residual
bottleneck blocks after each but the last, and the simplified attention of Cheng et al. 2020 (arXiv
2001.01568) after the second and the last; the synthesis is the mirror image. 510846 FLOPs per pixel
and 7,337,792 parameters for the analysis, as published with the shallow decoders of Yang and Mandt
2023. Alignment is that of TensorFlow's SAME padding.
"""

from collections.abc import Sequence
from typing import Optional

import tensorflow as tf

from common.layers import (
  Conv2D,
  Conv2DTranspose,
  Layer,
  Sequential,
  same_origin,
  traced_once,
  traces_once,
)


class ResidualBottleneck(Layer):
  """x + conv1x1(relu(conv3x3(relu(conv1x1(x))))), with half the channels in the middle.

  No activation follows the sum (Cheng et al. 2020 had one).
  """

  def __init__(self, channels: int, name: Optional[str] = None):
    """Makes the block for `channels` (even) input and output channels."""
    super().__init__(name=name)
    self.in_channels = self.out_channels = channels
    half = channels // 2
    with self.name_scope:
      self.branch = Sequential(
        [
          Conv2D(channels, half, 1, activation="relu", name="reduce"),
          Conv2D(half, half, 3, activation="relu", name="middle"),
          Conv2D(half, channels, 1, name="expand"),
        ],
        name="branch",
      )

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    """x: [B,H,W,channels]. Returns the same shape."""
    if not traces_once(x):
      return x + self.branch(x)
    weights = [convolution.weights() for convolution in self.branch.layers]
    return traced_once((type(self), self.in_channels), self._run, x, weights)

  def _run(self, x: tf.Tensor, weights: Sequence[tuple[tf.Tensor, tf.Tensor]]) -> tf.Tensor:
    """The block with other weights than its own, in float32."""
    y = x
    for convolution, own in zip(self.branch.layers, weights):
      y = convolution.run(y, *own)
    return x + y

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`: what the branch needs; x itself lies within."""
    return self.branch.needs(first, last)

  def macs(self, height: int, width: int) -> int:
    """Those of the three convolutions."""
    return self.branch.macs(height, width)

  def elementwise(self, height: int, width: int) -> int:
    """The biases, and one addition for each value."""
    return self.branch.elementwise(height, width) + height * width * self.out_channels


class Attention(Layer):
  """x + trunk(x) * sigmoid(conv1x1(mask(x))); trunk and mask are `ResidualBottleneck`s.

  The simplified attention of Cheng et al. 2020, without the non-local block.
  """

  def __init__(self, channels: int, num_blocks: int = 3, name: Optional[str] = None):
    """Makes the block for `channels` (even); `num_blocks` in the trunk and in the mask branch."""
    super().__init__(name=name)
    self.in_channels = self.out_channels = channels
    with self.name_scope:
      self.trunk = Sequential(residual_blocks(channels, num_blocks, "trunk"), name="trunk")
      self.mask = Sequential(
        [
          *residual_blocks(channels, num_blocks, "mask"),
          Conv2D(channels, channels, 1, activation="sigmoid", name="mask_out"),
        ],
        name="mask",
      )

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    """x: [B,H,W,channels]. Returns the same shape."""
    return x + self.trunk(x) * self.mask(x)

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`: what one branch or the other needs."""
    trunk, mask = self.trunk.needs(first, last), self.mask.needs(first, last)
    return min(trunk[0], mask[0]), max(trunk[1], mask[1])

  def macs(self, height: int, width: int) -> int:
    """Those of both branches."""
    return self.trunk.macs(height, width) + self.mask.macs(height, width)

  def elementwise(self, height: int, width: int) -> int:
    """Those of both branches, and a product and an addition for each value."""
    return (
      self.trunk.elementwise(height, width)
      + self.mask.elementwise(height, width)
      + 2 * height * width * self.out_channels
    )


def residual_blocks(channels: int, count: int, name: str) -> list[Layer]:
  """`count` blocks in a row."""
  return [ResidualBottleneck(channels, name=f"{name}_res{i}") for i in range(count)]


def _check(channels: Sequence[int]) -> None:
  if len(channels) != 4 or any(c % 2 for c in channels):
    raise ValueError(f"channels is {tuple(channels)}; ELIC has 4 stages, of even channels each.")


class ElicAnalysis(Sequential):
  """Stages of a 5x5 /2 convolution and blocks (see the top of this file).

  x: [B,H,W,3]. Returns [B,H/16,W/16,channels[3]].
  """

  def __init__(
    self,
    channels: Sequence[int] = (192, 192, 192, 320),
    num_residual_blocks: int = 3,
    name: Optional[str] = None,
  ):
    """Makes the layers.

    Args:
      channels: of the four stages; the last are those of the latents.
      num_residual_blocks: after each stage but the last.
      name: the name of the module.
    """
    _check(channels)
    widths = [3, *channels]
    layers: list[Layer] = []
    for i in range(4):
      origin = same_origin(5, 2)
      layers.append(Conv2D(widths[i], widths[i + 1], 5, 2, origin=origin, name=f"conv{i}"))
      if i < 3:
        layers += residual_blocks(widths[i + 1], num_residual_blocks, f"stage{i}")
      if i in (1, 3):
        layers.append(Attention(widths[i + 1], name=f"attention{i}"))
    super().__init__(layers, name=name)


class ElicSynthesis(Sequential):
  """The mirror image of `ElicAnalysis`, of transposed convolutions.

  y: [B,h,w,channels[3]]. Returns [B,16h,16w,output_channels].
  """

  def __init__(
    self,
    channels: Sequence[int] = (192, 192, 192, 320),
    num_residual_blocks: int = 3,
    output_channels: int = 3,
    name: Optional[str] = None,
  ):
    """Makes the layers.

    Args:
      channels: as the analysis has them, from the image to the latents.
      num_residual_blocks: before each convolution but the first.
      output_channels: channels of the image.
      name: the name of the module.
    """
    _check(channels)
    widths = [*reversed(channels), output_channels]
    layers: list[Layer] = [Attention(widths[0], name="attention0")]
    for i in range(4):
      origin = same_origin(5, 2)
      layers.append(Conv2DTranspose(widths[i], widths[i + 1], 5, 2, origin=origin, name=f"conv{i}"))
      if i == 1:
        layers.append(Attention(widths[i + 1], name=f"attention{i + 1}"))
      if i < 3:
        layers += residual_blocks(widths[i + 1], num_residual_blocks, f"stage{i}")
    super().__init__(layers, name=name)
