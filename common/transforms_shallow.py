"""The shallow decoders of Yang and Mandt 2023 ("shallow-ntc", arXiv 2304.06244).

One or two transposed convolutions in place of a deep synthesis: about 2.4 thousand FLOPs per pixel
and 11 thousand. A kernel lies over its block of `stride` samples as in TensorFlow's SAME padding:
it reaches as far into the block before as into the one after, or one sample further into that.
"""

import math
from collections.abc import Sequence
from typing import Callable, Optional

import tensorflow as tf

from common.layers import (
  Activation,
  Conv2D,
  Conv2DTranspose,
  Layer,
  Sequential,
  make_activation,
  same_origin,
)

RES_TYPES = ("conv", "d2s")


class AppendOnes(Layer):
  """Appends a channel that is 1 everywhere: the next layer's kernel paints a constant with it."""

  def __init__(self, channels: int, name: Optional[str] = None):
    """Makes the layer for `channels` input channels."""
    super().__init__(name=name)
    self.in_channels = channels
    self.out_channels = channels + 1

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    """x: [B,H,W,C]. Returns [B,H,W,C+1]."""
    return tf.pad(x, [[0, 0], [0, 0], [0, 0], [0, 1]], constant_values=1)

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`: each sample for itself."""
    return first, last


class DepthToSpace(Layer):
  """Moves channels into space, tf.nn.depth_to_space: block^2 x channels to block x block pixels."""

  def __init__(self, channels: int, block: int, name: Optional[str] = None):
    """Makes the layer for `channels` output channels."""
    super().__init__(name=name)
    self.in_channels = channels * block**2
    self.out_channels = channels
    self.upsample = block

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    """x: [B,H,W,block^2*channels]. Returns [B,block*H,block*W,channels]."""
    return tf.nn.depth_to_space(x, self.upsample) if self.upsample > 1 else x

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`: each block for itself."""
    return first // self.upsample, last // self.upsample


class JPEGLikeSynthesis(Sequential):
  """One transposed convolution, as JPEG's decoder: each latent paints its own pattern.

  y: [B,h,w,in_channels]. Returns [B,strides*h,strides*w,output_channels]. With kernel_size=strides
  the patterns tile the image; with kernel_size=18 and strides=16 they overlap by a sample.
  """

  def __init__(
    self,
    in_channels: int = 320,
    output_channels: int = 3,
    kernel_size: int = 16,
    strides: int = 16,
    use_offset: bool = False,
    use_bias: bool = True,
    name: Optional[str] = None,
  ):
    """Makes the layers.

    Args:
      in_channels: channels of the latents.
      output_channels: channels of the image.
      kernel_size: the side of a latent's pattern.
      strides: the side of a block.
      use_offset: whether to append a latent that is always 1, so that a constant pattern is
        added to each block (use_bias adds a constant colour).
      use_bias: whether to add a bias.
      name: the name of the module.
    """
    layers: list[Layer] = [AppendOnes(in_channels, name="offset")] if use_offset else []
    layers.append(
      Conv2DTranspose(
        in_channels + int(use_offset),
        output_channels,
        kernel_size,
        strides,
        use_bias=use_bias,
        origin=same_origin(kernel_size, strides),
        name="conv0",
      )
    )
    super().__init__(layers, name=name)


class JPEGLikeHyperSynthesis(Sequential):
  """From hyper-latents to means and log scales of latents by one transposed convolution.

  z: [B,h,w,in_channels]. Returns [B,4h,4w,2*bottleneck_size].
  """

  def __init__(
    self,
    bottleneck_size: int = 320,
    kernel_size: int = 6,
    in_channels: Optional[int] = None,
    name: Optional[str] = None,
  ):
    """Makes the layer.

    Args:
      bottleneck_size: channels of the latents, for each of which there are two outputs.
      kernel_size: the side of a hyper-latent's pattern.
      in_channels: channels of the hyper-latents; None for bottleneck_size.
      name: the name of the module.
    """
    n = bottleneck_size
    origin = same_origin(kernel_size, 4)
    super().__init__(
      [Conv2DTranspose(in_channels or n, 2 * n, kernel_size, 4, origin=origin, name="conv0")],
      name=name,
    )


class TwoLayerSynthesis(Sequential):
  """Two transposed convolutions with an activation between.

  y: [B,h,w,in_channels]. Returns [B,s*h,s*w,channels[1]], s the product of the strides.
  """

  def __init__(
    self,
    channels: Sequence[int] = (24, 3),
    strides: Sequence[int] = (8, 2),
    kernel_sizes: Sequence[int] = (13, 5),
    activation_type: Activation = "igdn",
    in_channels: int = 320,
    gdn_gamma_init: float = 0.1,
    name: Optional[str] = None,
  ):
    """Makes the layers.

    Args:
      channels: between the layers, and of the image.
      strides: by how much each layer enlarges.
      kernel_sizes: taps in each direction.
      activation_type: between the layers (see `make_activation`).
      in_channels: channels of the latents.
      gdn_gamma_init: initial gamma of an "igdn" (see `GDN`).
      name: the name of the module.
    """
    _check(channels, strides, kernel_sizes)
    origins = [same_origin(k, s) for k, s in zip(kernel_sizes, strides)]
    hidden, out = channels
    super().__init__(
      [
        Conv2DTranspose(
          in_channels, hidden, kernel_sizes[0], strides[0], origin=origins[0], name="conv0"
        ),
        make_activation(activation_type, hidden, "activation0", gdn_gamma_init),
        Conv2DTranspose(hidden, out, kernel_sizes[1], strides[1], origin=origins[1], name="conv1"),
      ],
      name=name,
    )


class TwoLayerResSynthesis(Sequential):
  """`TwoLayerSynthesis` with a linear branch parallel to the first layer and its activation.

  y: [B,h,w,in_channels]. Returns [B,s*h,s*w,channels[1]], s the product of the strides:
  conv1(activation(conv0(y)) + linear(y)).
  """

  def __init__(
    self,
    channels: Sequence[int] = (12, 3),
    strides: Sequence[int] = (8, 2),
    kernel_sizes: Sequence[int] = (13, 5),
    activation_type: Activation = "igdn",
    res_type: str = "conv",
    in_channels: int = 320,
    gdn_gamma_init: float = 0.1,
    name: Optional[str] = None,
  ):
    """Makes the layers. The arguments are those of `TwoLayerSynthesis`, and:

    Args:
      res_type: the linear branch: "conv" for a transposed convolution like the first layer's, "d2s"
        for a 1x1 convolution whose channels are then moved into space.
    """
    _check(channels, strides, kernel_sizes)
    hidden, out = channels
    origin = same_origin(kernel_sizes[1], strides[1])
    super().__init__(
      [
        ActivatedPlusLinear(
          in_channels,
          hidden,
          kernel_sizes[0],
          strides[0],
          activation_type,
          res_type,
          gdn_gamma_init,
          name="layer0",
        ),
        Conv2DTranspose(hidden, out, kernel_sizes[1], strides[1], origin=origin, name="conv1"),
      ],
      name=name,
    )


class ActivatedPlusLinear(Layer):
  """activation(convolution(y)) + linear(y): the first layer of `TwoLayerResSynthesis`.

  Attributes:
    convolution: with res_type="conv" it computes both summands at once: the first half of its
      output channels are activated, the second half are the linear branch.
    activation: of the first summand.
    linear: the linear branch with res_type="d2s", else None.
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    activation_type: Activation = "igdn",
    res_type: str = "conv",
    gdn_gamma_init: float = 0.1,
    name: Optional[str] = None,
  ):
    """Makes the layers. The arguments are explained in `TwoLayerResSynthesis`."""
    super().__init__(name=name)
    if res_type not in RES_TYPES:
      raise ValueError(f"Unknown res_type {res_type!r}. Known: {', '.join(RES_TYPES)}.")
    self.in_channels = in_channels
    self.out_channels = out_channels
    self.upsample = stride
    with self.name_scope:
      self.convolution = Conv2DTranspose(
        in_channels,
        out_channels * (2 if res_type == "conv" else 1),
        kernel_size,
        stride,
        origin=same_origin(kernel_size, stride),
        name="conv",
      )
      self.activation = make_activation(activation_type, out_channels, "activation", gdn_gamma_init)
      self.linear: Optional[Sequential] = None
      if res_type == "d2s":
        self.linear = Sequential(
          [
            Conv2D(in_channels, out_channels * stride**2, 1, name="linear"),
            DepthToSpace(out_channels, stride),
          ]
        )

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    """x: [B,h,w,in_channels]. Returns [B,stride*h,stride*w,out_channels]."""
    y = self.convolution(x)
    if self.linear is None:
      y, linear = tf.split(y, 2, axis=-1)
    else:
      linear = self.linear(x)
    return self.activation(y) + linear

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`: what one branch or the other needs."""
    spans = [self.convolution.needs(first, last)]
    if self.linear is not None:
      spans.append(self.linear.needs(first, last))
    return min(s[0] for s in spans), max(s[1] for s in spans)

  def macs(self, height: int, width: int) -> int:
    """Those of both branches and the activation."""
    return self._sum(lambda layer, h, w: layer.macs(h, w), height, width)

  def elementwise(self, height: int, width: int) -> int:
    """Those of both branches and the activation, and one addition for each value."""
    total = self._sum(lambda layer, h, w: layer.elementwise(h, w), height, width)
    return total + math.prod(self.output_size(height, width)) * self.out_channels

  def _sum(self, count: Callable[[Layer, int, int], int], height: int, width: int) -> int:
    total = count(self.convolution, height, width)
    total += count(self.activation, *self.output_size(height, width))
    return total if self.linear is None else total + count(self.linear, height, width)


def _check(channels: Sequence[int], strides: Sequence[int], kernel_sizes: Sequence[int]) -> None:
  for name, values in (
    ("channels", channels),
    ("strides", strides),
    ("kernel_sizes", kernel_sizes),
  ):
    if len(values) != 2:
      raise ValueError(f"{name} is {tuple(values)}; two layers need two numbers.")
