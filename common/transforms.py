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

Sizes: an analysis transform takes images of any size, and its outputs are those of the image with
zeros after its end; codecs pad to multiples of `downsample_factor` first. Channels that a
transform takes are its argument `in_channels`, those that it gives `output_channels`.

Here are the deep stacks and the hyperprior's; `transforms_elic` has ELIC's, `transforms_shallow`
the shallow decoders of Yang and Mandt 2023 ("shallow-ntc", arXiv 2304.06244), whose published
variants of all of these are what the FLOPs in tests/test_profiling.py come from.
"""

import difflib
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Optional, TypeVar

from common.layers import (
  GDN,
  Activation,
  Conv2D,
  Conv2DTranspose,
  KernelInitializer,
  Layer,
  Sequential,
  make_activation,
  same_origin,
)
from common.transforms_elic import ElicAnalysis, ElicSynthesis
from common.transforms_shallow import (
  JPEGLikeHyperSynthesis,
  JPEGLikeSynthesis,
  TwoLayerResSynthesis,
  TwoLayerSynthesis,
)

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
        f"{name} has no argument {key!r}.{_hint(key, arguments)} Known: {', '.join(arguments)}. "
        "(Overriding a transform's name keeps the arguments of the one before: where they do not "
        "fit, replace the whole group in a config file.)"
      )
  return _REGISTRY[name](**kwargs)


def from_config(config: Mapping[str, Any]) -> Layer:
  """The transform that a config's dict describes: its name and its arguments."""
  arguments = dict(config)
  if "name" not in arguments:
    raise ValueError(f"A transform needs a name. Known: {', '.join(known_transforms())}.")
  return make_transform(arguments.pop("name"), **arguments)


def check_pair(analysis: Layer, synthesis: Layer) -> None:
  """Raises ValueError if a synthesis does not lead back from what an analysis gives."""
  if analysis.downsample != synthesis.upsample:
    raise ValueError(
      f"The analysis shrinks images by {analysis.downsample}, the synthesis grows latents by "
      f"{synthesis.upsample}: choose strides whose products are equal."
    )
  if analysis.out_channels != synthesis.in_channels:
    raise ValueError(
      f"The analysis gives {analysis.out_channels} channels, the synthesis takes "
      f"{synthesis.in_channels}."
    )


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


@register
class MBT2018Analysis(Sequential):
  """The analysis of Ballé et al. 2018 and Minnen et al. 2018: 5x5 /2 convolutions, GDN between.

  x: [B,H,W,3]. Returns [B,H/2^n_layers,W/2^n_layers,output_channels]. Aligned as `SignalConv2D`.
  """

  def __init__(
    self,
    channels_base: int = 192,
    n_layers: int = 4,
    output_channels: Optional[int] = None,
    gdn_beta_init: float = 1.0,
    gdn_gamma_init: float = 0.1,
    name: Optional[str] = None,
  ):
    """Makes the layers.

    Args:
      channels_base: channels between the layers.
      n_layers: the number of convolutions.
      output_channels: channels of the latents; None for channels_base.
      gdn_beta_init: initial beta of the normalisations (see `GDN`).
      gdn_gamma_init: initial gamma of the normalisations (see `GDN`).
      name: the name of the module.
    """
    widths = _widths(3, channels_base, n_layers, output_channels or channels_base)
    layers: list[Layer] = []
    for i in range(n_layers):
      layers.append(Conv2D(widths[i], widths[i + 1], 5, 2, name=f"conv{i}"))
      if i + 1 < n_layers:
        layers.append(GDN(channels_base, False, gdn_beta_init, gdn_gamma_init, name=f"gdn{i}"))
    super().__init__(layers, name=name)


@register
class MBT2018Synthesis(Sequential):
  """The mirror of `MBT2018Analysis`: 5x5 x2 transposed convolutions, inverse GDN between.

  y: [B,h,w,in_channels]. Returns [B,h*2^n_layers,w*2^n_layers,output_channels].
  """

  def __init__(
    self,
    channels_base: int = 192,
    n_layers: int = 4,
    output_channels: int = 3,
    in_channels: Optional[int] = None,
    gdn_beta_init: float = 1.0,
    gdn_gamma_init: float = 0.1,
    name: Optional[str] = None,
  ):
    """Makes the layers.

    Args:
      channels_base: channels between the layers.
      n_layers: the number of convolutions.
      output_channels: channels of the image.
      in_channels: channels of the latents; None for channels_base.
      gdn_beta_init: initial beta of the normalisations (see `GDN`).
      gdn_gamma_init: initial gamma of the normalisations (see `GDN`).
      name: the name of the module.
    """
    widths = _widths(in_channels or channels_base, channels_base, n_layers, output_channels)
    layers: list[Layer] = []
    for i in range(n_layers):
      layers.append(Conv2DTranspose(widths[i], widths[i + 1], 5, 2, name=f"conv{i}"))
      if i + 1 < n_layers:
        layers.append(GDN(channels_base, True, gdn_beta_init, gdn_gamma_init, name=f"igdn{i}"))
    super().__init__(layers, name=name)


@register
class CNNAnalysis(Sequential):
  """Four 5x5 /2 convolutions: the shape of `MBT2018Analysis`, SAME alignment, other activations.

  x: [B,H,W,3]. Returns [B,H/16,W/16,output_channels].
  """

  def __init__(
    self,
    channels_base: int = 192,
    output_channels: Optional[int] = None,
    activation_type: Activation = "leaky_relu",
    name: Optional[str] = None,
  ):
    """Makes the layers.

    Args:
      channels_base: channels between the layers.
      output_channels: channels of the latents; None for channels_base.
      activation_type: after all layers but the last (see `make_activation`).
      name: the name of the module.
    """
    widths = _widths(3, channels_base, 4, output_channels or channels_base)
    super().__init__(_plain_stack(Conv2D, widths, activation_type), name=name)


@register
class CNNSynthesis(Sequential):
  """The mirror of `CNNAnalysis`: four 5x5 x2 transposed convolutions.

  y: [B,h,w,in_channels]. Returns [B,16h,16w,output_channels].
  """

  def __init__(
    self,
    channels_base: int = 192,
    output_channels: int = 3,
    activation_type: Activation = "leaky_relu",
    in_channels: Optional[int] = None,
    name: Optional[str] = None,
  ):
    """Makes the layers.

    Args:
      channels_base: channels between the layers.
      output_channels: channels of the image.
      activation_type: after all layers but the last (see `make_activation`).
      in_channels: channels of the latents; None for channels_base.
      name: the name of the module.
    """
    widths = _widths(in_channels or channels_base, channels_base, 4, output_channels)
    super().__init__(_plain_stack(Conv2DTranspose, widths, activation_type), name=name)


def _widths(first: int, between: int, num_layers: int, last: int) -> list[int]:
  """Channels before, between and after `num_layers` convolutions."""
  if num_layers < 1:
    raise ValueError(f"n_layers is {num_layers}; it must be at least 1.")
  return [first, *[between] * (num_layers - 1), last]


def _plain_stack(
  convolution: type, widths: Sequence[int], activation_type: Activation
) -> list[Layer]:
  """5x5 convolutions of stride 2 from and to these widths, with activations between."""
  origin = same_origin(5, 2)
  layers: list[Layer] = []
  for i, (first, second) in enumerate(zip(widths, widths[1:])):
    layers.append(convolution(first, second, 5, 2, origin=origin, name=f"conv{i}"))
    if i + 2 < len(widths):
      layers.append(make_activation(activation_type, second, name=f"activation{i}"))
  return layers


@register
class HyperAnalysis(Sequential):
  """From latents to hyper-latents, Minnen et al. 2018: 3x3, 5x5 /2, 5x5 /2 with ReLU between.

  y: [B,h,w,in_channels]. Returns [B,h/4,w/4,bottleneck_size].
  """

  def __init__(
    self, bottleneck_size: int = 320, in_channels: Optional[int] = None, name: Optional[str] = None
  ):
    """Makes the layers.

    Args:
      bottleneck_size: channels of the hyper-latents, and between the layers.
      in_channels: channels of the latents; None for bottleneck_size.
      name: the name of the module.
    """
    n = bottleneck_size
    same = same_origin(5, 2)
    super().__init__(
      [
        Conv2D(in_channels or n, n, 3, activation="relu", name="conv0"),
        Conv2D(n, n, 5, 2, activation="relu", origin=same, name="conv1"),
        Conv2D(n, n, 5, 2, origin=same, name="conv2"),
      ],
      name=name,
    )


@register
class HyperSynthesis(Sequential):
  """From hyper-latents to means and log scales of latents: 5x5 x2, 5x5 x2, 3x3 with ReLU between.

  z: [B,h,w,in_channels]. Returns [B,4h,4w,2*bottleneck_size]. Minnen et al. 2018.
  """

  def __init__(
    self,
    bottleneck_size: int = 320,
    in_channels: Optional[int] = None,
    channels: Optional[Sequence[int]] = None,
    name: Optional[str] = None,
  ):
    """Makes the layers.

    Args:
      bottleneck_size: channels of the latents, for each of which there are two outputs.
      in_channels: channels of the hyper-latents; None for bottleneck_size.
      channels: between the layers; None for in_channels and 1.5 x as many.
      name: the name of the module.
    """
    n = bottleneck_size
    if channels is not None and len(channels) != 2:
      raise ValueError(
        f"channels is {tuple(channels)}; three layers have two numbers between them."
      )
    given = in_channels or n
    first, second = (given, given * 3 // 2) if channels is None else channels
    same = same_origin(5, 2)
    super().__init__(
      [
        Conv2DTranspose(given, first, 5, 2, activation="relu", origin=same, name="conv0"),
        Conv2DTranspose(first, second, 5, 2, activation="relu", origin=same, name="conv1"),
        Conv2DTranspose(second, 2 * n, 3, name="conv2"),
      ],
      name=name,
    )


@register
class HyperAnalysisSmall(Sequential):
  """`HyperAnalysis` with one level less, for images of 32x32: 3x3, ReLU, 5x5 /2 without a bias.

  y: [B,h,w,in_channels]. Returns [B,h/2,w/2,bottleneck_size]. Aligned as `SignalConv2D`.
  """

  def __init__(
    self, bottleneck_size: int = 320, in_channels: Optional[int] = None, name: Optional[str] = None
  ):
    """Makes the layers. The arguments are those of `HyperAnalysis`."""
    n = bottleneck_size
    super().__init__(
      [
        Conv2D(in_channels or n, n, 3, activation="relu", name="conv0"),
        Conv2D(n, n, 5, 2, use_bias=False, name="conv1"),
      ],
      name=name,
    )


@register
class HyperSynthesisSmall(Sequential):
  """`HyperSynthesis` with one level less: 5x5 x2 to 1.5 x the channels, ReLU, 3x3 to 2 x.

  z: [B,h,w,in_channels]. Returns [B,2h,2w,2*bottleneck_size]. Aligned as `SignalConv2D`.
  """

  def __init__(
    self, bottleneck_size: int = 320, in_channels: Optional[int] = None, name: Optional[str] = None
  ):
    """Makes the layers. The arguments are those of `HyperSynthesis`."""
    n = bottleneck_size
    super().__init__(
      [
        Conv2DTranspose(in_channels or n, n * 3 // 2, 5, 2, activation="relu", name="conv0"),
        Conv2DTranspose(n * 3 // 2, 2 * n, 3, name="conv1"),
      ],
      name=name,
    )


for _transform in (
  ElicAnalysis,
  ElicSynthesis,
  JPEGLikeHyperSynthesis,
  JPEGLikeSynthesis,
  TwoLayerResSynthesis,
  TwoLayerSynthesis,
):
  register(_transform)
