"""A network that edits a picture before standard JPEG compresses it (Talebi et al. 2020).

Residual: the network's output is added to the picture. A 7x7 convolution, residual units with batch
normalisation, a 7x7 convolution to three channels, as "Better compression with deep pre-editing".
"""

from collections.abc import Sequence
from typing import Optional

import numpy as np
import tensorflow as tf

from common.layers import Conv2D, Layer

_MOMENTUM = 0.99
_EPSILON = 1e-3


class BatchNorm(Layer):
  """Batch normalisation over all but the channels; moving averages outside of training.

  Attributes:
    scale, offset: [channels], trained.
    mean, variance: [channels], moving averages.
  """

  def __init__(self, channels: int, scale: float = 1.0, name: Optional[str] = None):
    """`scale`: its initial value; 0 makes a residual unit start as the identity."""
    super().__init__(name=name)
    self.in_channels = self.out_channels = channels
    self.scale = tf.Variable(tf.fill([channels], scale), name="scale")
    self.offset = tf.Variable(tf.zeros([channels]), name="offset")
    moving = {
      "trainable": False,
      "synchronization": tf.VariableSynchronization.ON_READ,
      "aggregation": tf.VariableAggregation.MEAN,
    }
    self.mean = tf.Variable(tf.zeros([channels]), name="mean", **moving)
    self.variance = tf.Variable(tf.ones([channels]), name="variance", **moving)

  def __call__(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
    """x: [B, H, W, channels]. In training the batch's own statistics, which move the averages."""
    mean, variance = self.mean, self.variance
    if training:
      mean, variance = tf.nn.moments(x, axes=[0, 1, 2])
      self.mean.assign(_MOMENTUM * self.mean + (1 - _MOMENTUM) * mean)
      self.variance.assign(_MOMENTUM * self.variance + (1 - _MOMENTUM) * variance)
    return tf.nn.batch_normalization(x, mean, variance, self.offset, self.scale, _EPSILON)

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`: each sample for itself, outside of training."""
    return first, last

  def elementwise(self, height: int, width: int) -> int:
    """A product and an addition for each value."""
    return 2 * height * width * self.in_channels


class ResidualUnit(Layer):
  """x + norm(conv(leaky(norm(conv(x))))), 3x3; a 1x1 convolution of x where channels change."""

  def __init__(self, in_channels: int, out_channels: int, name: Optional[str] = None):
    super().__init__(name=name)
    self.in_channels, self.out_channels = in_channels, out_channels
    self.first = Conv2D(in_channels, out_channels, 3, use_bias=False)
    self.first_norm = BatchNorm(out_channels)
    self.second = Conv2D(out_channels, out_channels, 3, use_bias=False)
    self.second_norm = BatchNorm(out_channels)
    self.shortcut = (
      None if in_channels == out_channels else Conv2D(in_channels, out_channels, 1, use_bias=False)
    )

  def __call__(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
    """x: [B, H, W, in_channels]. Returns [B, H, W, out_channels]."""
    y = tf.nn.leaky_relu(self.first_norm(self.first(x), training))
    y = self.second_norm(self.second(y), training)
    return y + (x if self.shortcut is None else self.shortcut(x))

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`: what the two convolutions need."""
    return self.first.needs(*self.second.needs(first, last))

  def macs(self, height: int, width: int) -> int:
    """The sum over its convolutions."""
    layers = (self.first, self.second, *(() if self.shortcut is None else (self.shortcut,)))
    return sum(layer.macs(height, width) for layer in layers)


class PreEdit(Layer):
  """[B, H, W, 3] in 0..255 to the edited picture, the same shape and range.

  Attributes:
    first: The 7x7 convolution of the picture.
    units: Residual units.
    last: The 7x7 convolution to what is added to the picture; starts at 0.
  """

  in_channels = out_channels = 3

  def __init__(self, filters: Sequence[int]):
    """`filters`: of the first convolution, of each residual unit, and of the last one (3).

    Raises:
      ValueError: Fewer than two numbers, or the last is not 3.
    """
    super().__init__(name="pre_edit")
    if len(filters) < 2 or filters[-1] != 3:
      raise ValueError(
        f"pre_edit.filters ends with 3 channels, after one number or more: {filters}."
      )
    self.first = Conv2D(3, filters[0], 7, activation="leaky_relu")
    self.units = [ResidualUnit(a, b) for a, b in zip(filters, filters[1:-1])]
    self.last = Conv2D(
      filters[-2], 3, 7, kernel_initializer=lambda shape: np.zeros(shape, np.float32)
    )

  def __call__(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
    """See the class; in training, batch normalisation uses the batch's statistics."""
    y = self.first(x / 127.5 - 1.0)
    for unit in self.units:
      y = unit(y, training)
    return tf.clip_by_value(x + 127.5 * self.last(y), 0.0, 255.0)

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`: what the layers need, one after the other."""
    for layer in (self.last, *reversed(self.units), self.first):
      first, last = layer.needs(first, last)
    return first, last

  def macs(self, height: int, width: int) -> int:
    """The sum over its layers."""
    return sum(layer.macs(height, width) for layer in (self.first, *self.units, self.last))
