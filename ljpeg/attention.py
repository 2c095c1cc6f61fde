"""A factor for every block and frequency: what a network thinks worth keeping.

Strümpler, Yang and Timofte 2020 multiply the divided coefficients by these before they are rounded,
so that the encoder smooths where it hardly shows. A block is one cell of features at 1/8 of the
picture's resolution; a 1x1 convolution makes 64 factors for luminance and 64 for chrominance.
"""

from collections.abc import Mapping
from typing import Any, Callable

import numpy as np
import tensorflow as tf

from common import lpips
from common.layers import Conv2D, Layer, Sequential

# Of the sigmoid at the start: factors of 0.97.
_INITIAL_BIAS = 3.5


class Attention(Layer):
  """Backbone, 1x1 convolution, sigmoid.

  Attributes:
    backbone: [B, H, W, 3] in 0..255 to features [B, H/8, W/8, C].
    head: Features to 128 channels.
  """

  downsample = 8
  in_channels = 3
  out_channels = 128

  def __init__(self, backbone: str, channels: int = 64):
    """`backbone`: one of BACKBONES; `channels`: of the features, where the backbone is trained.

    Raises:
      ValueError: There is no such backbone; the message lists those that exist.
      lpips.LpipsError: "alexnet" without weights.
    """
    super().__init__(name="attention")
    if backbone not in BACKBONES:
      raise ValueError(f"Unknown backbone {backbone!r}. Known: {', '.join(sorted(BACKBONES))}.")
    self.backbone, features = BACKBONES[backbone](channels)
    self.head = Conv2D(
      features, 128, 1, kernel_initializer=lambda shape: tf.random.normal(shape, stddev=0.01)
    )
    self.head.bias.assign(np.full(128, _INITIAL_BIAS, np.float32))

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    """x: [B, H, W, 3] in 0..255, sides multiples of 8. Returns [B, H/8, W/8, 128] in 0..1."""
    return tf.nn.sigmoid(self.head(self.backbone(x)))

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`; only of a backbone that is made of this project's layers."""
    if not isinstance(self.backbone, Layer):
      return super().needs(first, last)
    return self.backbone.needs(first, last)

  def macs(self, height: int, width: int) -> int:
    """Of the head, and of a backbone that is made of this project's layers."""
    known = self.backbone.macs(height, width) if isinstance(self.backbone, Layer) else 0
    return known + self.head.macs(height // 8, width // 8)


class _Frozen:
  """A backbone that is not trained, kept where neither checkpoints nor tf.Module look."""

  def __init__(self, function: Callable[[tf.Tensor], tf.Tensor]):
    self._function = function

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    return self._function(x)


def _cnn(channels: int) -> tuple[Layer, int]:
  """A small network that is trained along."""
  layers = [_Centre()]
  widths = [3, max(1, channels // 4), max(1, channels // 2), channels]
  for before, after in zip(widths, widths[1:]):
    layers.append(Conv2D(before, after, 5, stride=2, activation="leaky_relu"))
  layers.append(Conv2D(channels, channels, 3, activation="leaky_relu"))
  return Sequential(layers, name="cnn"), channels


class _Centre(Layer):
  """0..255 to -1..1."""

  in_channels = out_channels = 3

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    return x / 127.5 - 1.0

  def needs(self, first: int, last: int) -> tuple[int, int]:
    return first, last


def _alexnet(channels: int) -> tuple[_Frozen, int]:
  """AlexNet up to its second convolution, with the weights of LPIPS (`common.lpips`)."""
  del channels
  weights = lpips.load()

  def trunk(x: tf.Tensor) -> tf.Tensor:
    x = (x / 127.5 - 1.0 - tf.constant(lpips.SHIFT)) / tf.constant(lpips.SCALE)
    for i, stride in ((1, 4), (2, 1)):
      # SAME instead of AlexNet's own padding: one cell a block.
      x = tf.nn.conv2d(x, tf.constant(weights[f"conv{i}_kernel"]), stride, "SAME")
      x = tf.nn.relu(x + tf.constant(weights[f"conv{i}_bias"]))
      if i == 1:
        x = tf.nn.max_pool2d(x, 3, 2, "SAME")
    return x / (1.0 + tf.sqrt(tf.reduce_mean(tf.square(x), axis=-1, keepdims=True)))

  return _Frozen(trunk), lpips.CHANNELS[1]


def _vgg19(channels: int) -> tuple[_Frozen, int]:
  """VGG19 up to block3_pool; Keras downloads its weights (80 MB) the first time."""
  del channels
  whole = tf.keras.applications.VGG19(include_top=False, weights="imagenet")
  model = tf.keras.Model(whole.input, whole.get_layer("block3_pool").output)
  model.trainable = False
  mean = tf.constant([103.939, 116.779, 123.68])  # Of B, G, R: what these weights expect.

  def trunk(x: tf.Tensor) -> tf.Tensor:
    x = model(x[..., ::-1] - mean, training=False)
    return x / (1.0 + tf.sqrt(tf.reduce_mean(tf.square(x), axis=-1, keepdims=True)))

  return _Frozen(trunk), 256


BACKBONES: Mapping[str, Callable[[int], tuple[Any, int]]] = {
  "alexnet": _alexnet,
  "cnn": _cnn,
  "vgg19": _vgg19,
}
