"""Convolutions and divisive normalisation as plain `tf.Module`s.

Three layers carry nearly all arithmetic of the models: `Conv2D` (analysis), `Conv2DTranspose`
(synthesis) and `GDN`. They compute what tensorflow_compression's `SignalConv2D` with
`padding="same_zeros"` and its `GDN` compute, given the same weights.

Alignment. One integer, the `origin`, says how a kernel of k taps lies over the samples, in each
of the two directions:

    Conv2D:           y[n] = sum_t kernel[t] x[stride * n + t - origin]
    Conv2DTranspose:  y[n] = sum_m kernel[n + origin - stride * m] x[m]

with x zero outside its support. The two are each other's adjoint. The default origin is k // 2
for an odd k, as in `SignalConv2D`: the kernel's middle tap meets the first sample. For an even k
it is (k - stride + 1) // 2, so that a kernel lies symmetrically over its block of `stride` samples:
with k = 16 and stride = 16 each latent paints its own 16x16 block and nothing else, with k = 18 it
reaches one sample into each neighbour. (`SignalConv2D` takes k // 2 there too; pass
`origin=k // 2` for that.)

Speed. Every operation is TensorFlow's own and differentiates as usual, chosen by measurement (a CPU
with oneDNN; `python -m benchmarks.train_step` compares with the plain layers):
- Padding is a separate operation, or SAME where that happens to mean the same thing: TensorFlow
  has fast gradients for VALID and SAME, and falls back to slower ones (up to 2 x) for explicit
  padding. The copies cost little; but crop with tf.slice, since the gradient of a Python slice is
  slow.
- A transform whose paddings would be SAME if the picture were mirrored runs on a mirrored picture,
  with mirrored kernels: 3% of a step of mbt2018 and bls2017, whose 5x5 kernels of stride 2 begin
  two samples before each block where SAME begins one. In training, that is: where sizes are open
  when a graph is made, as in coding, it runs as it is.
- For a transposed convolution from many channels to few, as to an image, the fast path
  wastes its vectors, and the fallback (a matrix product, then additions) takes half the
  time.
- A 1x1 convolution is a matrix product, which takes 0.6 of the time of tf.nn.conv2d.
- The gradient of a bias reads its input through a reshape. Otherwise oneDNN's graph pass merges it
  with that of the kernel into one operation, which takes 1.3 times as long as the two (3x3, 96
  channels): 2.5% of a step with ELIC's analysis.
- The gradient of a strided or wide kernel's convolution is made of convolutions without strides, of
  up to 63 columns (`_kernel_gradient`).
- GDN is a matrix product and a hand-written gradient; the rest of it is bound by memory.

Precision. Layers compute in the type of their input, or within `precision.computing_in` in 16 bits
where that is float32, and return the type of their input. A `Sequential` keeps 16 bits from its
first layer to its last but one. GDN and the sums of biases' gradients are float32.
"""

import abc
import contextlib
import math
import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Callable, Optional, Union

import numpy as np
import tensorflow as tf

from common import precision

_budget = threading.local()


@contextlib.contextmanager
def at_most(weights: int) -> Iterator[None]:
  """Layers that are made within have so many weights in all, or making one raises ValueError.

  It is raised before anything is allocated: for configs that come from elsewhere.
  """
  before = getattr(_budget, "left", None)
  _budget.left = weights
  try:
    yield
  finally:
    _budget.left = before


def _claim(weights: int) -> None:
  left = getattr(_budget, "left", None)
  if left is None:
    return
  if weights > left:
    raise ValueError(f"a layer has {weights} weights, where {left} are left of those announced")
  _budget.left = left - weights


KernelInitializer = Union[None, np.ndarray, tf.Tensor, Callable[[tuple[int, ...]], np.ndarray]]
Activation = Union[None, str, Callable[[tf.Tensor], tf.Tensor]]
Dimension = Union[int, tf.Tensor]  # Known, or a scalar.


def _on_cpu() -> bool:
  """Whether layers run where they were measured; a GPU gets TensorFlow's plain operations."""
  return not tf.config.list_physical_devices("GPU")


_tracing = threading.local()


@contextlib.contextmanager
def tracing_once() -> Iterator[None]:
  """Within, while a graph is made, blocks that are alike may be traced once (`traced_once`)."""
  before = getattr(_tracing, "functions", None)
  _tracing.functions = {}
  try:
    yield
  finally:
    _tracing.functions = before


def traces_once(x: tf.Tensor) -> bool:
  """Whether a block of x may use `traced_once`: not where its effect was not measured, which is on
  a GPU, with several replicas, and in 16 bits."""
  return (
    getattr(_tracing, "functions", None) is not None
    and x.dtype == tf.float32
    and not precision.is_lowered(x)
    and not tf.distribute.has_strategy()
    and _on_cpu()
  )


def traced_once(
  kind: Hashable, function: Callable[..., tf.Tensor], x: tf.Tensor, *weights: Any
) -> tf.Tensor:
  """function(x, *weights), where `traces_once(x)`; the first such call of a `kind` is traced.

  The others call what was traced then, once for each shape, and TensorFlow puts copies of it in
  their place before the graph runs. A training with ELIC's analysis begins 0.3 to 0.4 s earlier.
  """
  functions = _tracing.functions
  if kind not in functions:
    functions[kind] = tf.function(function, autograph=False)
  return functions[kind](x, *weights)


_LEAK = 0.2  # The slope below zero, tf.nn.leaky_relu's default.


@tf.custom_gradient
def _leaky_relu(x: tf.Tensor):
  """tf.nn.leaky_relu; its gradient reads the output, so that the input need not be kept."""
  y = tf.nn.leaky_relu(x, _LEAK)

  def grad(dy: tf.Tensor):
    return tf.raw_ops.LeakyReluGrad(gradients=dy, features=y, alpha=_LEAK)

  return y, grad


@tf.custom_gradient
def _add_bias(x: tf.Tensor, bias: tf.Tensor):
  """tf.nn.bias_add, whose gradient stays apart from the kernel's (see the top of this file)."""

  def grad(dy: tf.Tensor):
    rows = precision.widened(tf.reshape(dy, [-1, bias.shape[0]]))  # A long sum.
    return dy, tf.cast(tf.raw_ops.BiasAddGrad(out_backprop=rows), bias.dtype)

  return tf.nn.bias_add(x, tf.cast(bias, x.dtype)), grad


_ACTIVATIONS = {
  "leaky_relu": _leaky_relu,
  "relu": tf.nn.relu,
  "sigmoid": tf.nn.sigmoid,
}


def leak_of(activation: Activation) -> Optional[float]:
  """The slope below zero of a (leaky) ReLU; None for other activations."""
  if activation in ("relu", tf.nn.relu):
    return 0.0
  return _LEAK if activation in ("leaky_relu", _leaky_relu) else None


def _activation(activation: Activation) -> Optional[Callable[[tf.Tensor], tf.Tensor]]:
  """Returns the function that `activation` names, is, or None."""
  if activation is None or callable(activation):
    return activation
  if activation not in _ACTIVATIONS:
    raise ValueError(
      f"Unknown activation {activation!r}. Known: "
      f"{', '.join(sorted(_ACTIVATIONS))}; a callable is taken as it is."
    )
  return _ACTIVATIONS[activation]


def _initial_kernel(
  initializer: KernelInitializer, shape: tuple[int, ...], fan_in: float
) -> tf.Tensor:
  """Evaluates `initializer` (see `Conv2D`) and checks the shape of what it gives."""
  if initializer is None:
    # Truncated at two standard deviations, hence the correction (as Keras's VarianceScaling).
    stddev = math.sqrt(1.0 / fan_in) / 0.87962566103423978
    return tf.random.truncated_normal(shape, stddev=stddev)
  value = initializer(shape) if callable(initializer) else initializer
  value = tf.convert_to_tensor(value, dtype=tf.float32)
  if tuple(value.shape) != shape:
    raise ValueError(f"The initial kernel has shape {tuple(value.shape)}; the layer's is {shape}.")
  return value


def default_origin(kernel_size: int, stride: int) -> int:
  """The tap that meets the first sample (see the top of this file)."""
  if kernel_size % 2:
    return kernel_size // 2
  if kernel_size < stride:
    raise ValueError(
      f"A kernel of even size {kernel_size} with stride {stride} leaves gaps and "
      "has no natural middle: give its `origin`."
    )
  return (kernel_size - stride + 1) // 2


def same_origin(kernel_size: int, stride: int) -> int:
  """The tap that meets the first sample in Keras's and TensorFlow's SAME padding.

  For sizes that are multiples of the stride. It lets a kernel reach as far beyond one end of its
  block of `stride` samples as beyond the other, or one further at the end.
  """
  return max(kernel_size - stride, 0) // 2


class Layer(tf.Module):
  """What profiling and transforms know of a layer.

  Attributes:
    downsample: by how much it makes the image smaller in each direction.
    upsample: by how much it makes the image larger in each direction.
    in_channels, out_channels: the channels of its input and of its output.
  """

  downsample: int = 1
  upsample: int = 1
  in_channels: int
  out_channels: int

  def output_size(self, height: int, width: int) -> tuple[int, int]:
    """The size of the output, given the size of the input."""
    down, up = self.downsample, self.upsample
    return -(-height // down) * up, -(-width // down) * up

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """First and last input sample, in either direction, that outputs `first` to `last` depend on.

    They may lie beyond the edges. Large pictures run in tiles by this (`common.tiling`).
    """
    raise NotImplementedError(f"{type(self).__name__} has no `needs`: it cannot run in tiles.")

  def mirroring_gains(self, height: int, width: int) -> Optional[int]:
    """How many values of an image `mirrored` does not copy that the plain call does (or minus).

    None: there is no `mirrored`, or not for inputs of this size.
    """
    del height, width
    return None

  def mirrored(self, x: tf.Tensor) -> tf.Tensor:
    """What the layer gives for x mirrored in both directions, mirrored back."""
    raise NotImplementedError(f"{type(self).__name__} has no `mirrored`.")

  def macs(self, height: int, width: int) -> int:
    """Multiply-adds for one image; height and width are those of the layer's input."""
    del height, width
    return 0

  def elementwise(self, height: int, width: int) -> int:
    """Additions of biases, and divisions or products of normalisations, for one image."""
    del height, width
    return 0

  def flops(self, height: int, width: int) -> int:
    """FLOPs for one image: two for each multiply-add (of the layer as a formula, not as run)."""
    return 2 * self.macs(height, width)

  def num_parameters(self) -> int:
    """The number of trained scalars."""
    return sum(math.prod(v.shape) for v in self.trainable_variables)


class _Convolution(Layer, abc.ABC):
  """What the two directions share: kernel, bias, origin, activation."""

  _spreads: bool  # Whether an input sample meets all taps: transposed.

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    use_bias: bool,
    activation: Activation,
    kernel_initializer: KernelInitializer,
    origin: Optional[int],
    fan_in: float,
    name: Optional[str],
  ):
    super().__init__(name=name)
    self.in_channels = in_channels
    self.out_channels = out_channels
    self.kernel_size = kernel_size
    self.stride = stride
    self.use_bias = use_bias
    self.activation = _activation(activation)
    self.origin = default_origin(kernel_size, stride) if origin is None else origin
    if not 0 <= self.origin < kernel_size:
      raise ValueError(f"origin is {self.origin}; it must be a tap, from 0 to {kernel_size - 1}.")
    shape = (kernel_size, kernel_size, in_channels, out_channels)
    _claim(math.prod(shape))
    with self.name_scope:
      self.kernel = tf.Variable(_initial_kernel(kernel_initializer, shape, fan_in), name="kernel")
      if use_bias:
        self.bias = tf.Variable(tf.zeros([out_channels]), name="bias")

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    """x: [B,H,W,in_channels]. Returns [B,H',W',out_channels], see `output_size`."""
    return self.run(x, *self.weights())

  def weights(self) -> tuple[tf.Tensor, Optional[tf.Tensor]]:
    """The kernel's values and, if there is one, the bias's."""
    bias = tf.convert_to_tensor(self.bias) if self.use_bias else None
    return tf.convert_to_tensor(self.kernel), bias

  def run(self, x: tf.Tensor, kernel: tf.Tensor, bias: Optional[tf.Tensor]) -> tf.Tensor:
    """The layer with other `weights` than its own."""
    return self._call(x, kernel, bias, self.origin)

  def mirrored(self, x: tf.Tensor) -> tf.Tensor:
    """See `Layer`."""
    kernel, bias = self.weights()
    return self._call(x, tf.reverse(kernel, [0, 1]), bias, self._mirrored_origin)

  def mirroring_gains(self, height: int, width: int) -> Optional[int]:
    """See `Layer`. A padding that is not TensorFlow's SAME takes a copy of the larger side."""
    down, up = self.downsample, self.upsample
    if self._mirrored_origin < 0 or height % down or width % down:
      return None
    if min(self.in_channels, self.out_channels) < _MANY_CHANNELS:
      return 0
    copied = height * width * (self.out_channels * up**2 if up > 1 else self.in_channels)
    before, after = map(self._is_same_for_multiples, (self.origin, self._mirrored_origin))
    return copied * (int(after) - int(before))

  @property
  def _mirrored_origin(self) -> int:
    """Sizes are multiples of the stride; less than 0 where the last sample lies beyond all taps."""
    return self.kernel_size - self.stride - self.origin

  def _is_same_for_multiples(self, origin: int) -> bool:
    """Whether TensorFlow's SAME padding is ours, for sizes that are multiples of the stride."""
    return self.kernel_size >= self.stride and (self.kernel_size - self.stride) // 2 == origin

  @abc.abstractmethod
  def _call(
    self, x: tf.Tensor, kernel: tf.Tensor, bias: Optional[tf.Tensor], origin: int
  ) -> tf.Tensor:
    """The layer with a kernel (as `self.kernel`), a bias and an origin of either sense."""

  @abc.abstractmethod
  def _run(self, x: tf.Tensor, kernel: tf.Tensor, origin: int) -> tf.Tensor:
    """The convolution itself; `kernel` as tf.nn.conv2d (or tf.nn.conv2d_transpose) has it."""

  @abc.abstractmethod
  def _adjoint(self, x: tf.Tensor, dy: tf.Tensor, kernel: tf.Tensor, origin: int) -> tf.Tensor:
    """The gradient of `_run` with respect to x, given that with respect to its output."""

  def _convolve(self, x: tf.Tensor, kernel: tf.Tensor, origin: int) -> tf.Tensor:
    """`_run`, and where a CPU's gradient of the kernel is slow, a faster one."""
    taps = -(-self.kernel_size // self.stride)
    is_wide = isinstance(x.shape[2], int) and x.shape[2] >= _WIDE
    if (
      not _on_cpu()
      or (self.stride == 1 and (self.kernel_size == 1 or not is_wide))
      or min(self.in_channels, self.out_channels) < _MANY_CHANNELS
      or self.kernel_size < self.stride
      or origin > self.stride * (taps - 1)
    ):
      return self._run(x, kernel, origin)

    @tf.custom_gradient
    def convolve(x: tf.Tensor, kernel: tf.Tensor):
      def grad(dy: tf.Tensor):
        fine, coarse = (dy, x) if self._spreads else (x, dy)
        dkernel = _kernel_gradient(fine, coarse, self.kernel_size, self.stride, origin)
        return self._adjoint(x, dy, kernel, origin), dkernel

      return self._run(x, kernel, origin), grad

    return convolve(x, kernel)

  def _finish(self, y: tf.Tensor, bias: Optional[tf.Tensor]) -> tf.Tensor:
    """Adds the bias and applies the activation."""
    if bias is not None:
      y = _add_bias(y, bias)
    return y if self.activation is None else self.activation(y)

  def elementwise(self, height: int, width: int) -> int:
    """One addition for each output if there is a bias."""
    return math.prod(self.output_size(height, width)) * self.out_channels * int(self.use_bias)


class Conv2D(_Convolution):
  """A correlation with a kernel, then downsampling.

  `SignalConv2D(out_channels, kernel_size, corr=True, strides_down=stride,
  padding="same_zeros")` for odd kernel sizes; see the top of this file for the alignment.

  Attributes:
    kernel: [kernel_size, kernel_size, in_channels, out_channels], as in tf.nn.conv2d.
    bias: [out_channels], if use_bias.
  """

  _spreads = False

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    use_bias: bool = True,
    activation: Activation = None,
    kernel_initializer: KernelInitializer = None,
    origin: Optional[int] = None,
    name: Optional[str] = None,
  ):
    """Makes the layer and its variables.

    Args:
      in_channels: channels of the input.
      out_channels: channels of the output.
      kernel_size: taps in each direction.
      stride: the downsampling factor.
      use_bias: whether to add a bias, which starts at 0.
      activation: None, "relu", "leaky_relu" or a callable.
      kernel_initializer: the initial kernel: an array of its shape, a callable from the shape to
        such an array, or None for normal numbers that keep the variance of white inputs.
      origin: the tap that meets the first sample; None for the default (top of this file).
      name: the name of the module.
    """
    super().__init__(
      in_channels,
      out_channels,
      kernel_size,
      stride,
      use_bias,
      activation,
      kernel_initializer,
      origin,
      fan_in=kernel_size**2 * in_channels,
      name=name,
    )
    self.downsample = stride

  def _call(
    self, x: tf.Tensor, kernel: tf.Tensor, bias: Optional[tf.Tensor], origin: int
  ) -> tf.Tensor:
    low = precision.lowered(x)
    kernel = tf.cast(kernel, low.dtype)
    if self.kernel_size == self.stride == 1:
      # A reshape: a slice and its gradient are ten operations in the graph of a step.
      matrix = tf.reshape(kernel, [self.in_channels, self.out_channels])
      return tf.cast(self._product(low, matrix, bias), x.dtype)
    return tf.cast(self._finish(self._convolve(low, kernel, origin), bias), x.dtype)

  def _run(self, x: tf.Tensor, kernel: tf.Tensor, origin: int) -> tf.Tensor:
    height, width = x.shape[1], x.shape[2]
    if self._is_same(height, origin) and self._is_same(width, origin):
      return tf.nn.conv2d(x, kernel, self.stride, "SAME")
    padding = [[0, 0], self._padding(height, origin), self._padding(width, origin), [0, 0]]
    return tf.nn.conv2d(tf.pad(x, padding), kernel, self.stride, "VALID")

  def _adjoint(self, x: tf.Tensor, dy: tf.Tensor, kernel: tf.Tensor, origin: int) -> tf.Tensor:
    size = _shape(x)
    if self._is_same(x.shape[1], origin) and self._is_same(x.shape[2], origin):
      return tf.nn.conv2d_transpose(dy, kernel, size, self.stride, "SAME")
    rows, columns = (size[i] + sum(self._padding(x.shape[i], origin)) for i in (1, 2))
    padded = [size[0], rows, columns, size[3]]
    dx = tf.nn.conv2d_transpose(dy, kernel, padded, self.stride, "VALID")
    return tf.slice(dx, [0, origin, origin, 0], size)

  def _product(self, x: tf.Tensor, matrix: tf.Tensor, bias: Optional[tf.Tensor]) -> tf.Tensor:
    """A 1x1 convolution as one matrix product; bias and activation before the shape comes back."""
    y = self._finish(tf.matmul(tf.reshape(x, [-1, self.in_channels]), matrix), bias)
    return tf.reshape(y, [*_shape(x)[:3], self.out_channels])

  def _padding(self, size: Optional[int], origin: int) -> list[int]:
    """Zeros before and after `size` samples; None is a size that is not known yet."""
    if size is None:
      return [origin, self.kernel_size - 1 - origin]
    last_start = (-(-size // self.stride) - 1) * self.stride - origin
    return [origin, max(0, last_start + self.kernel_size - size)]

  def _is_same(self, size: Optional[int], origin: int) -> bool:
    """Whether TensorFlow's SAME padding is ours, for `size` samples."""
    if self.stride > 1 and (size is None or size % self.stride):
      return False
    return self._is_same_for_multiples(origin)

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`."""
    begin = self.stride * first - self.origin
    return begin, begin + self.stride * (last - first) + self.kernel_size - 1

  def macs(self, height: int, width: int) -> int:
    """kernel_size^2 x in_channels x out_channels for each output position."""
    return (
      math.prod(self.output_size(height, width))
      * self.kernel_size**2
      * self.in_channels
      * self.out_channels
    )


class Conv2DTranspose(_Convolution):
  """Upsampling by zeros, then a convolution with a kernel.

  `SignalConv2D(out_channels, kernel_size, corr=False, strides_up=stride, padding="same_zeros")`
  for odd kernel sizes; see the top of this file for the alignment.

  Attributes:
    kernel: [kernel_size, kernel_size, in_channels, out_channels], as in `SignalConv2D` (and not
      as in tf.nn.conv2d_transpose, which swaps the channels). Not flipped: kernel[:, :, c, :] is
      what a single 1 in channel c paints.
    bias: [out_channels], if use_bias.
  """

  _spreads = True

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    use_bias: bool = True,
    activation: Activation = None,
    kernel_initializer: KernelInitializer = None,
    origin: Optional[int] = None,
    name: Optional[str] = None,
  ):
    """Makes the layer and its variables. The arguments are those of `Conv2D`.

    Here `stride` is the upsampling factor. The default initial kernel takes into account that
    only 1 in stride^2 of its taps meets a sample.
    """
    super().__init__(
      in_channels,
      out_channels,
      kernel_size,
      stride,
      use_bias,
      activation,
      kernel_initializer,
      origin,
      fan_in=max(kernel_size / stride, 1) ** 2 * in_channels,
      name=name,
    )
    self.upsample = stride

  def _call(
    self, x: tf.Tensor, kernel: tf.Tensor, bias: Optional[tf.Tensor], origin: int
  ) -> tf.Tensor:
    low = precision.lowered(x)
    kernel = tf.transpose(tf.cast(kernel, low.dtype), [0, 1, 3, 2])
    return tf.cast(self._finish(self._convolve(low, kernel, origin), bias), x.dtype)

  def _run(self, x: tf.Tensor, kernel: tf.Tensor, origin: int) -> tf.Tensor:
    batch, height, width, _ = _shape(x)
    before, after = self._padding(origin)
    size = [batch, height * self.stride, width * self.stride, self.out_channels]
    if self.in_channels >= 64 and self.out_channels <= _FEW_CHANNELS:
      padding = [[0, 0], [before, after], [before, after], [0, 0]]
      return tf.nn.conv2d_transpose(x, kernel, size, self.stride, padding)
    if self._is_same_for_multiples(origin):
      return tf.nn.conv2d_transpose(x, kernel, size, self.stride, "SAME")
    padded = [batch, size[1] + before + after, size[2] + before + after, self.out_channels]
    y = tf.nn.conv2d_transpose(x, kernel, padded, self.stride, "VALID")
    return tf.slice(y, [0, before, before, 0], size)

  def _adjoint(self, x: tf.Tensor, dy: tf.Tensor, kernel: tf.Tensor, origin: int) -> tf.Tensor:
    del x
    if self._is_same_for_multiples(origin):
      return tf.nn.conv2d(dy, kernel, self.stride, "SAME")
    padding = [[0, 0], self._padding(origin), self._padding(origin), [0, 0]]
    return tf.nn.conv2d(tf.pad(dy, padding), kernel, self.stride, "VALID")

  def _padding(self, origin: int) -> list[int]:
    """This is the gradient of a correlation that pads its stride*H samples, to give H, by so much.

    Zeros before and after.
    """
    return [origin, max(0, self.kernel_size - self.stride - origin)]

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`: all m for which output + origin - stride * m is a tap of the kernel."""
    return (
      -((self.kernel_size - 1 - self.origin - first) // self.stride),
      (last + self.origin) // self.stride,
    )

  def macs(self, height: int, width: int) -> int:
    """kernel_size^2 x in_channels x out_channels for each input position."""
    return height * width * self.kernel_size**2 * self.in_channels * self.out_channels


def _shape(x: tf.Tensor) -> list[Dimension]:
  """The shape of x: numbers where they are known, scalar tensors elsewhere."""
  if None not in tuple(x.shape):
    return list(x.shape)
  dynamic = tf.shape(x)
  return [dynamic[i] if n is None else n for i, n in enumerate(x.shape)]


def _kernel_gradient(
  fine: tf.Tensor, coarse: tf.Tensor, kernel_size: int, stride: int, origin: int
) -> tf.Tensor:
  """kernel[t] = sum_n fine[stride * n + t - origin] coarse[n]^T, the gradient of a kernel.

  TensorFlow's takes 1.4 to 1.6 times as long with strides as without (oneDNN on a CPU), so this
  sorts the samples of `fine` by their place within a block: each place has its own taps, which lie
  a block apart.

  Args:
    fine: [B,H,W,C], the convolution's input (or the gradient of a transposed one's output).
    coarse: [B,ceil(H/stride),ceil(W/stride),D].
    kernel_size: taps in each direction, not fewer than stride.
    stride: samples of `fine` to one of `coarse`.
    origin: the tap that meets the first sample; at most the last multiple of stride in a kernel.

  Returns:
    [kernel_size, kernel_size, C, D].
  """
  batch, height, width, channels = _shape(fine)
  _, rows, columns, _ = _shape(coarse)
  taps = -(-kernel_size // stride)
  blocks = [rows + taps - 1, columns + taps - 1]
  padding = [
    [origin, stride * count - size - origin] for count, size in zip(blocks, [height, width])
  ]
  padded = tf.pad(fine, [[0, 0], *padding, [0, 0]])
  split = tf.reshape(padded, [batch, blocks[0], stride, blocks[1], stride, channels])
  places = tf.reshape(
    tf.transpose(split, [2, 4, 0, 1, 3, 5]), [stride**2, batch, *blocks, channels]
  )
  gradients = []
  parts = _in_parts(columns)
  coarse_parts = [
    coarse if len(parts) == 1 else tf.slice(coarse, [0, 0, at, 0], [batch, rows, size, -1])
    for at, size in parts
  ]
  for place, of_place in enumerate(tf.unstack(places, num=stride**2)):  # No copies.
    # The taps i, i + stride, ... below kernel_size, and j, j + stride, ...
    i, j = divmod(place, stride)
    here = [-(-(kernel_size - i) // stride), -(-(kernel_size - j) // stride)]
    gradient = _sum([
      tf.raw_ops.Conv2DBackpropFilter(
        input=tf.slice(
          of_place, [0, 0, at, 0], [batch, rows + here[0] - 1, size + here[1] - 1, channels]
        ),
        filter_sizes=[*here, channels, coarse.shape[3]],
        out_backprop=coarse_part,
        strides=[1, 1, 1, 1],
        padding="VALID",
      )
      for (at, size), coarse_part in zip(parts, coarse_parts)
    ])  # fmt: skip
    missing = [[0, taps - here[0]], [0, taps - here[1]], [0, 0], [0, 0]]
    gradients.append(tf.pad(gradient, missing))
  sides = [stride, stride, taps, taps, channels, coarse.shape[3]]
  kernel = tf.transpose(tf.reshape(tf.stack(gradients), sides), [2, 0, 3, 1, 4, 5])
  kernel = tf.reshape(kernel, [taps * stride, taps * stride, channels, coarse.shape[3]])
  return kernel[:kernel_size, :kernel_size]


def _sum(parts: Sequence[tf.Tensor]) -> tf.Tensor:
  """Of one type, added in float32."""
  if len(parts) == 1:
    return parts[0]
  return tf.cast(tf.add_n([precision.widened(part) for part in parts]), parts[0].dtype)


def _in_parts(columns: Dimension) -> list[tuple[Dimension, Dimension]]:
  """(first, number) of columns for one convolution each of `_kernel_gradient`.

  oneDNN's gradient of a kernel is a tenth slower for 64 columns than twice that for 32; with them
  the sums of a block of channels leave the cache.
  """
  if not isinstance(columns, int):
    return [(0, columns)]
  count = max(1, columns // _COLUMNS)
  ends = [columns * i // count for i in range(count + 1)]
  return [(begin, end - begin) for begin, end in zip(ends, ends[1:])]


_COLUMNS = 32

# From so many columns on parts pay without strides too (3x3, 96 channels: a tenth to a sixth).
_WIDE = 128

# From so many channels on, on both sides, `_kernel_gradient` pays.
_MANY_CHANNELS = 64

# Up to so many outputs a transposed convolution is faster as a matrix product and additions.
_FEW_CHANNELS = 48

# Keeps gradients of the reparameterised parameters away from zero; as in tensorflow_compression.
_PEDESTAL = 2.0**-36


@tf.custom_gradient
def _lower_bound(x: tf.Tensor, bound: float):
  """max(x, bound), whose gradient passes below the bound if a step would move x up."""

  def grad(dy: tf.Tensor):
    return tf.where(tf.logical_or(x >= bound, dy < 0), dy, tf.zeros_like(dy)), None

  return tf.maximum(x, bound), grad


class NonnegativeParameter(tf.Module):
  """A trained array that stays at or above `minimum`, as GDN needs it.

  The variable is the square root (plus a pedestal), so that steps get smaller near zero; its lower
  bound lets gradients through that lead back up. As tensorflow_compression's `GDNParameter`.
  """

  def __init__(self, initial_value: np.ndarray, minimum: float = 0.0, name: Optional[str] = None):
    super().__init__(name=name)
    initial_value = tf.cast(tf.convert_to_tensor(initial_value), tf.float32)
    self._bound = math.sqrt(minimum + _PEDESTAL)
    self.variable = tf.Variable(
      tf.sqrt(tf.maximum(initial_value + _PEDESTAL, _PEDESTAL)), name=f"reparam_{name}"
    )

  def __call__(self) -> tf.Tensor:
    """The array itself."""
    return tf.square(_lower_bound(tf.convert_to_tensor(self.variable), self._bound)) - _PEDESTAL


def _normalize(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor, inverse: bool) -> tf.Tensor:
  """The formula of `GDN` for x [N,C], with a gradient in as few passes over memory as it takes."""

  @tf.custom_gradient
  def normalize(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor):
    magnitude = tf.abs(x)
    normalizer = tf.nn.bias_add(tf.matmul(magnitude, gamma), beta)
    y = x * normalizer if inverse else x / normalizer

    def grad(dy: tf.Tensor):
      if inverse:
        direct = dy * normalizer
        through = dy * x  # the gradient with respect to the normalizer
      else:
        direct = dy / normalizer
        through = direct * y  # minus the gradient with respect to the normalizer
      indirect = tf.sign(x) * tf.matmul(through, gamma, transpose_b=True)
      dbeta = tf.reduce_sum(through, axis=0)
      dgamma = tf.matmul(magnitude, through, transpose_a=True)
      if inverse:
        return direct + indirect, dbeta, dgamma
      return direct - indirect, -dbeta, -dgamma

    return y, grad

  return normalize(x, beta, gamma)


class GDN(Layer):
  """Divisive normalisation with absolute values: y[i] = x[i] / (beta[i] + sum_j |x[j]| gamma[j,i]).

  The inverse multiplies instead. tensorflow_compression's `GDN` with its default alpha and epsilon
  of 1 (Johnston et al. 2019 call it GDN1; Ballé et al. 2017 had a square root of squares).

  Attributes:
    beta: [channels], at least 1e-6.
    gamma: [channels, channels], from input channel j to output channel i, at least 0.
  """

  def __init__(
    self,
    channels: int,
    inverse: bool = False,
    beta_init: Union[float, Sequence[float], np.ndarray] = 1.0,
    gamma_init: Union[float, np.ndarray] = 0.1,
    name: Optional[str] = None,
  ):
    """Makes the layer and its variables.

    Args:
      channels: channels of input and output.
      inverse: whether to multiply by the normaliser rather than to divide by it.
      beta_init: initial beta, a number or [channels].
      gamma_init: initial gamma, [channels, channels], or a number g for g times the identity.
      name: the name of the module.
    """
    super().__init__(name=name)
    _claim(channels**2)
    self.in_channels = self.out_channels = channels
    self.inverse = inverse
    beta = np.broadcast_to(np.asarray(beta_init, np.float32), [channels])
    gamma = np.asarray(gamma_init, np.float32)
    if gamma.ndim == 0:
      gamma = gamma * np.eye(channels, dtype=np.float32)
    if gamma.shape != (channels, channels):
      raise ValueError(
        f"gamma_init has shape {gamma.shape}; it must be a number or ({channels}, {channels})."
      )
    with self.name_scope:
      self._beta = NonnegativeParameter(beta, minimum=1e-6, name="beta")
      self._gamma = NonnegativeParameter(gamma, name="gamma")

  @property
  def beta(self) -> tf.Tensor:
    """[channels]."""
    return self._beta()

  @property
  def gamma(self) -> tf.Tensor:
    """[channels, channels], from input to output."""
    return self._gamma()

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    """x: [B,H,W,channels]. Returns the same shape."""
    wide = precision.widened(x)
    y = _normalize(
      tf.reshape(wide, [-1, self.in_channels]),
      tf.cast(self.beta, wide.dtype),
      tf.cast(self.gamma, wide.dtype),
      self.inverse,
    )
    return tf.cast(tf.reshape(y, tf.shape(x)), x.dtype)

  def mirroring_gains(self, height: int, width: int) -> Optional[int]:
    """See `Layer`: none, each sample is for itself."""
    del height, width
    return 0

  def mirrored(self, x: tf.Tensor) -> tf.Tensor:
    """See `Layer`."""
    return self(x)

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`: each sample for itself."""
    return first, last

  def macs(self, height: int, width: int) -> int:
    """Channels^2 for each position."""
    return height * width * self.in_channels**2

  def elementwise(self, height: int, width: int) -> int:
    """One addition of beta and one division (or product) for each value."""
    return 2 * height * width * self.in_channels


class Pointwise(Layer):
  """An activation function as a layer, for where it does not go with a convolution."""

  def mirroring_gains(self, height: int, width: int) -> Optional[int]:
    """See `Layer`: none, each sample is for itself."""
    del height, width
    return 0

  def mirrored(self, x: tf.Tensor) -> tf.Tensor:
    """See `Layer`."""
    return self(x)

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`: each sample for itself."""
    return first, last

  def __init__(self, channels: int, activation: Activation, name: Optional[str] = None):
    """Makes the layer for `channels`; see `Conv2D` for `activation`."""
    super().__init__(name=name)
    self.in_channels = self.out_channels = channels
    self.activation = _activation(activation)

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    """x: [B,H,W,channels]. Returns the same shape."""
    return x if self.activation is None else self.activation(x)


def make_activation(
  activation_type: Activation,
  channels: int,
  name: Optional[str] = None,
  gdn_gamma_init: float = 0.1,
) -> Layer:
  """The layer that `activation_type` names: "gdn", "igdn", or an activation of `Conv2D`.

  `gdn_gamma_init` is the initial gamma of a `GDN`.

  Raises:
    ValueError: no activation has that name; the message lists those that exist.
  """
  if activation_type in ("gdn", "igdn"):
    return GDN(channels, activation_type == "igdn", gamma_init=gdn_gamma_init, name=name)
  if isinstance(activation_type, str) and activation_type not in _ACTIVATIONS:
    raise ValueError(
      f"Unknown activation_type {activation_type!r}. Known: gdn, igdn, "
      f"{', '.join(sorted(_ACTIVATIONS))}."
    )
  return Pointwise(channels, activation_type, name=name)


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
    """x: [B,H,W,in_channels] float32. Returns [B,H',W',out_channels] float32.

    The last layer of a transform is never in 16 bits: latents and pixels need their integers.
    """
    height, width = x.shape[1], x.shape[2]
    if height is None or width is None or not _on_cpu():
      return self._call(x, self.layers)
    mirrors = height * width * self.in_channels
    mirrors += math.prod(self.output_size(height, width)) * self.out_channels
    if (self.mirroring_gains(height, width) or 0) <= mirrors:
      return self._call(x, self.layers)
    return tf.reverse(self.mirrored(tf.reverse(x, [1, 2])), [1, 2])

  def mirrored(self, x: tf.Tensor) -> tf.Tensor:
    """See `Layer`."""
    return self._call(x, [layer.mirrored for layer in self.layers])

  def mirroring_gains(self, height: int, width: int) -> Optional[int]:
    """See `Layer`: the sum over the layers."""
    total = 0
    for layer in self.layers:
      gains = layer.mirroring_gains(height, width)
      if gains is None:
        return None
      total += gains
      height, width = layer.output_size(height, width)
    return total

  def _call(self, x: tf.Tensor, calls: Sequence[Callable[[tf.Tensor], tf.Tensor]]) -> tf.Tensor:
    y = precision.lowered(x)
    for call in calls[:-1]:
      y = call(y)
    if x.dtype != tf.float32:  # Within a layer of another one.
      return calls[-1](y)
    with precision.computing_in(None):
      return calls[-1](precision.widened(y))

  def macs(self, height: int, width: int) -> int:
    """The sum over the layers."""
    return self._sum(lambda layer, h, w: layer.macs(h, w), height, width)

  def elementwise(self, height: int, width: int) -> int:
    """The sum over the layers."""
    return self._sum(lambda layer, h, w: layer.elementwise(h, w), height, width)

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Layer`: from the last layer back to the first."""
    for layer in reversed(self.layers):
      first, last = layer.needs(first, last)
    return first, last

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
