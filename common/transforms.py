"""Analysis and synthesis transforms, made by name.

A transform is a `Sequential` of the layers in `common.layers` (or of blocks that are layers
themselves). To add one, write a class whose constructor lists its layers, and decorate it:

    @register
    class MyAnalysis(Sequential):
      '''What it is, and where it is from.'''

      def __init__(self, num_filters=192, kernel_initializers=None, name=None):
        init = _per_layer(kernel_initializers, 2)
        super().__init__([
            Conv2D(3, num_filters, 5, 2, activation="relu", kernel_initializer=init[0]),
            Conv2D(num_filters, num_filters, 5, 2, kernel_initializer=init[1]),
        ], name=name)

Images enter analysis transforms as x / 255 - 0.5, and synthesis transforms return such images; the
conversion is up to the caller.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any, Callable, Optional, TypeVar

import tensorflow as tf

from common.layers import GDN, Conv2D, Conv2DTranspose, KernelInitializer, Layer

KernelInitializers = Optional[Sequence[KernelInitializer]]

_REGISTRY: dict[str, type[Layer]] = {}

_T = TypeVar("_T", bound=type[Layer])


def register(cls: _T) -> _T:
  """Class decorator: makes a transform known to `make_transform` by its class name."""
  if cls.__name__ in _REGISTRY:
    raise ValueError(f"A transform {cls.__name__!r} is registered already.")
  _REGISTRY[cls.__name__] = cls
  return cls


def known_transforms() -> list[str]:
  """The names that `make_transform` knows, sorted."""
  return sorted(_REGISTRY)


def make_transform(name: str, **kwargs: Any) -> Layer:
  """Makes the transform that is registered as `name`.

  Raises:
    ValueError: no transform has that name; the message lists those that exist.
    TypeError: the transform has no such argument; the message lists its arguments.
  """
  if name not in _REGISTRY:
    raise ValueError(
      f"Unknown transform {name!r}.{_hint(name, known_transforms())} "
      f"Known: {', '.join(known_transforms())}."
    )
  arguments = [p for p in inspect.signature(_REGISTRY[name]).parameters if p != "name"]
  for key in kwargs:
    if key not in arguments and key != "name":
      raise TypeError(
        f"{name} has no argument {key!r}.{_hint(key, arguments)} Known: {', '.join(arguments)}."
      )
  return _REGISTRY[name](**kwargs)


def _hint(word: str, known: Sequence[str]) -> str:
  close = difflib.get_close_matches(word, known, n=1)
  return f" Did you mean {close[0]!r}?" if close else ""


def _per_layer(initializers: KernelInitializers, num_layers: int) -> list[KernelInitializer]:
  """One initialiser for each convolution, in order; None stands for all defaults."""
  if initializers is None:
    return [None] * num_layers
  if len(initializers) != num_layers:
    raise ValueError(
      f"kernel_initializers has {len(initializers)} entries; this transform has "
      f"{num_layers} convolutions (None keeps a layer's default)."
    )
  return list(initializers)


class Sequential(Layer):
  """Layers one after the other, itself a layer.

  Attributes:
    layers: the layers in order.
    in_channels, out_channels: channels of the first layer's input and the last one's output.
  """

  def __init__(self, layers: Sequence[Layer], name: Optional[str] = None):
    super().__init__(name=name)
    for first, second in zip(layers, layers[1:]):
      if first.out_channels != second.in_channels:
        raise ValueError(
          f"{type(first).__name__} gives {first.out_channels} channels; "
          f"{type(second).__name__} after it takes {second.in_channels}."
        )
    self.layers = list(layers)
    self.in_channels = layers[0].in_channels
    self.out_channels = layers[-1].out_channels
    self.downsample = math.prod(layer.downsample for layer in layers)
    self.upsample = math.prod(layer.upsample for layer in layers)

  @property
  def downsample_factor(self) -> int:
    """How many input samples, in each direction, make one output sample."""
    return self.downsample

  @property
  def upsample_factor(self) -> int:
    """How many output samples, in each direction, one input sample makes."""
    return self.upsample

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    """x: [B,H,W,in_channels] float32. Returns [B,H',W',out_channels] float32."""
    for layer in self.layers:
      x = layer(x)
    return x

  def macs(self, height: int, width: int) -> int:
    """The sum over the layers."""
    return self._sum(lambda layer, h, w: layer.macs(h, w), height, width)

  def elementwise(self, height: int, width: int) -> int:
    """The sum over the layers."""
    return self._sum(lambda layer, h, w: layer.elementwise(h, w), height, width)

  def output_size(self, height: int, width: int):
    """The size after the last layer."""
    for layer in self.layers:
      height, width = layer.output_size(height, width)
    return height, width

  def _sum(self, count: Callable[[Layer, int, int], int], height: int, width: int) -> int:
    total = 0
    for layer in self.layers:
      total += count(layer, height, width)
      height, width = layer.output_size(height, width)
    return total


@register
class BLS2017Analysis(Sequential):
  """The analysis of Ballé, Laparra and Simoncelli 2017: 9x9 /4, 5x5 /2, 5x5 /2 with GDN between.

  x: [B,H,W,3]. Returns [B,H/16,W/16,output_channels]. The last convolution has no bias.
  """

  def __init__(
    self,
    num_filters: int = 256,
    output_channels: Optional[int] = None,
    kernel_initializers: KernelInitializers = None,
    gdn_beta_init: float = 1.0,
    gdn_gamma_init: float = 0.1,
    name: Optional[str] = None,
  ):
    """Makes the layers.

    Args:
      num_filters: channels between the layers.
      output_channels: channels of the latents; None for num_filters.
      kernel_initializers: one for each of the three convolutions (see `Conv2D`), or None.
      gdn_beta_init: initial beta of the normalisations (see `GDN`).
      gdn_gamma_init: initial gamma of the normalisations (see `GDN`).
      name: the name of the module.
    """
    n = num_filters
    init = _per_layer(kernel_initializers, 3)
    gdn = functools.partial(GDN, n, beta_init=gdn_beta_init, gamma_init=gdn_gamma_init)
    super().__init__(
      [
        Conv2D(3, n, 9, 4, kernel_initializer=init[0], name="conv0"),
        gdn(name="gdn0"),
        Conv2D(n, n, 5, 2, kernel_initializer=init[1], name="conv1"),
        gdn(name="gdn1"),
        Conv2D(
          n, output_channels or n, 5, 2, use_bias=False, kernel_initializer=init[2], name="conv2"
        ),
      ],
      name=name,
    )


@register
class BLS2017Synthesis(Sequential):
  """The synthesis of Ballé, Laparra and Simoncelli 2017: 5x5 x2, 5x5 x2, 9x9 x4 with inverse GDN.

  y: [B,h,w,in_channels]. Returns [B,16h,16w,output_channels].
  """

  def __init__(
    self,
    num_filters: int = 256,
    in_channels: Optional[int] = None,
    output_channels: int = 3,
    kernel_initializers: KernelInitializers = None,
    gdn_beta_init: float = 1.0,
    gdn_gamma_init: float = 0.1,
    name: Optional[str] = None,
  ):
    """Makes the layers.

    Args:
      num_filters: channels between the layers.
      in_channels: channels of the latents; None for num_filters.
      output_channels: channels of the image.
      kernel_initializers: one for each of the three convolutions (see `Conv2DTranspose`), or None.
      gdn_beta_init: initial beta of the normalisations (see `GDN`).
      gdn_gamma_init: initial gamma of the normalisations (see `GDN`).
      name: the name of the module.
    """
    n = num_filters
    init = _per_layer(kernel_initializers, 3)
    igdn = functools.partial(
      GDN, n, inverse=True, beta_init=gdn_beta_init, gamma_init=gdn_gamma_init
    )
    super().__init__(
      [
        Conv2DTranspose(in_channels or n, n, 5, 2, kernel_initializer=init[0], name="conv0"),
        igdn(name="igdn0"),
        Conv2DTranspose(n, n, 5, 2, kernel_initializer=init[1], name="conv1"),
        igdn(name="igdn1"),
        Conv2DTranspose(n, output_channels, 9, 4, kernel_initializer=init[2], name="conv2"),
      ],
      name=name,
    )
