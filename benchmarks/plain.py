"""Train steps of bls2017 and mbt2018 as they are written with tensorflow_compression's own parts.

`SignalConv2D`, `GDN` and entropy models with their default arguments, Keras' Adam, gradients
clipped as the configs clip them: the same models, objective and batch as the project's. By default
those layers keep their kernels as Fourier coefficients; `kernels="variable"` keeps them as they
are, which few programs ask for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Callable, Optional

import numpy as np

if TYPE_CHECKING:
  import tensorflow as tf

# Of the Gaussian conditional: scales, their bounds, and how many.
_SCALE_MIN, _SCALE_MAX, _NUM_SCALES = 0.11, 256.0, 64

_TRANSFORMS = ("analysis", "synthesis", "hyper_analysis", "hyper_synthesis")
_BLS2017 = ["BLS2017Analysis", "BLS2017Synthesis"]
_MBT2018 = ["MBT2018Analysis", "MBT2018Synthesis", "HyperAnalysis", "HyperSynthesis"]

_Code = Callable[["tf.Tensor"], tuple["tf.Tensor", "tf.Tensor"]]


def is_known(config: Any) -> bool:
  """Whether `make_step` knows the config's model."""
  model = config.model_config
  transforms = [model[key].name for key in _TRANSFORMS if key in model]
  if transforms not in (_BLS2017, _MBT2018):
    return False
  return model.analysis.output_channels == model.synthesis.in_channels  # Not of the VAE.


def make_step(config: Any, crops: np.ndarray, kernels: Optional[str] = None) -> Callable[[], float]:
  """A step of the config's model on `crops`, uint8 [B,P,P,3]; returns the loss.

  Args:
    config: Of bls2017 or mbt2018.
    crops: A batch.
    kernels: See `SignalConv2D`'s `kernel_parameter`; None for its default.

  Raises:
    ValueError: Another model.
  """
  import tensorflow as tf

  if not is_known(config):
    raise ValueError(f"Plain layers are known for {_BLS2017} and {_MBT2018} alone.")
  model = config.model_config
  make = _bls2017 if model.analysis.name == "BLS2017Analysis" else _mbt2018
  code, variables = make(model, {"kernel_parameter": kernels} if kernels else {})
  optimizer = tf.keras.optimizers.Adam(config.optimizer_config.learning_rate, jit_compile=False)
  optimizer.build(variables)
  pixels, clip_norm = crops[..., 0].size, config.optimizer_config.gradient_clip_norm

  @tf.function  # With AutoGraph: `GDN` tests tensors with `if`.
  def step(crops: tf.Tensor) -> tf.Tensor:
    x = tf.cast(crops, tf.float32)
    with tf.GradientTape() as tape:
      y, bits = code(x / 255.0 - 0.5)
      mse = tf.reduce_mean(tf.math.squared_difference(x, (y + 0.5) * 255.0))
      loss = bits / pixels + model.rd_lambda * mse
    gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, variables), clip_norm)
    optimizer.apply_gradients(zip(gradients, variables))
    return loss

  return lambda: float(step(crops))


def _bls2017(model: Any, options: dict[str, Any]) -> tuple[_Code, list[tf.Variable]]:
  """x in -0.5..0.5 to its reconstruction and its bits; what is trained."""
  import tensorflow as tf
  import tensorflow_compression as tfc

  filters, latents = model.analysis.num_filters, model.analysis.output_channels
  analysis = _sequential(
    3,
    [
      _down(filters, 9, 4, options),
      tfc.GDN(),
      _down(filters, 5, 2, options),
      tfc.GDN(),
      _down(latents, 5, 2, options, use_bias=False),
    ],
  )
  synthesis = _sequential(
    latents,
    [
      _up(filters, 5, 2, options),
      tfc.GDN(inverse=True),
      _up(filters, 5, 2, options),
      tfc.GDN(inverse=True),
      _up(3, 9, 4, options),
    ],
  )
  prior = tfc.NoisyDeepFactorized(batch_shape=(latents,))
  entropy_model = tfc.ContinuousBatchedEntropyModel(prior, coding_rank=3)

  def code(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    y, bits = entropy_model(analysis(x), training=True)
    return synthesis(y), tf.reduce_sum(bits)

  return code, _trained(analysis, synthesis, prior)


def _mbt2018(model: Any, options: dict[str, Any]) -> tuple[_Code, list[tf.Variable]]:
  """As `_bls2017`, with a mean-scale hyperprior."""
  import tensorflow as tf
  import tensorflow_compression as tfc

  base, latents = model.analysis.channels_base, model.analysis.output_channels
  bottleneck, relu = model.hyper_analysis.bottleneck_size, tf.nn.relu
  down: list[Any] = []
  up: list[Any] = []
  for _ in range(3):
    down += [_down(base, 5, 2, options), tfc.GDN()]
    up += [_up(base, 5, 2, options), tfc.GDN(inverse=True)]
  analysis = _sequential(3, [*down, _down(latents, 5, 2, options)])
  synthesis = _sequential(latents, [*up, _up(3, 5, 2, options)])
  hyper_analysis = _sequential(
    latents,
    [
      _down(bottleneck, 3, 1, options, activation=relu),
      _down(bottleneck, 5, 2, options, activation=relu),
      _down(bottleneck, 5, 2, options),
    ],
  )
  hyper_synthesis = _sequential(
    bottleneck,
    [
      _up(bottleneck, 5, 2, options, activation=relu),
      _up(bottleneck * 3 // 2, 5, 2, options, activation=relu),
      _up(latents * 2, 3, 1, options),
    ],
  )
  prior = tfc.NoisyDeepFactorized(batch_shape=(bottleneck,))
  entropy_model = tfc.ContinuousBatchedEntropyModel(prior, coding_rank=3)
  step = math.log(_SCALE_MAX / _SCALE_MIN) / (_NUM_SCALES - 1)
  conditional = tfc.LocationScaleIndexedEntropyModel(
    tfc.NoisyNormal,
    num_scales=_NUM_SCALES,
    scale_fn=lambda index: tf.exp(math.log(_SCALE_MIN) + step * index),
    coding_rank=3,
  )

  def code(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    y = analysis(x)
    z, z_bits = entropy_model(hyper_analysis(y), training=True)
    mean, index = tf.split(hyper_synthesis(z), 2, axis=-1)
    y, y_bits = conditional(y, index, loc=mean, training=True)
    return synthesis(y), tf.reduce_sum(z_bits) + tf.reduce_sum(y_bits)

  return code, _trained(analysis, synthesis, hyper_analysis, hyper_synthesis, prior)


def _down(channels: int, kernel: int, stride: int, options: dict[str, Any], **more: Any) -> Any:
  import tensorflow_compression as tfc

  options = {"use_bias": True, "padding": "same_zeros", **options, **more}
  return tfc.SignalConv2D(channels, kernel, corr=True, strides_down=stride, **options)


def _up(channels: int, kernel: int, stride: int, options: dict[str, Any], **more: Any) -> Any:
  import tensorflow_compression as tfc

  options = {"use_bias": True, "padding": "same_zeros", **options, **more}
  return tfc.SignalConv2D(channels, kernel, corr=False, strides_up=stride, **options)


def _sequential(channels: int, layers: list[Any]) -> tf.keras.Sequential:
  import tensorflow as tf

  made = tf.keras.Sequential(layers)
  made.build([None, None, None, channels])
  return made


def _trained(*parts: Any) -> list[tf.Variable]:
  return [variable for part in parts for variable in part.trainable_variables]
