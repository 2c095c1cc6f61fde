"""Initial values that make a hyperprior tell each place's contrast from the first step on.

From random weights the hyper-latents cost bits at once and help after thousands of steps only; a
short training learns to keep them at zero. Here the hyper-analysis starts as the mean magnitude of
groups of latents over a neighbourhood, and the hyper-synthesis as a linear map of it to log scales,
fitted to data: Ballé et al. 2018 (arXiv 1802.01436, section 3) motivate the hyperprior with just
this dependency of neighbouring scales.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from common.layers import Conv2D, Conv2DTranspose, Layer, Sequential

_SPREAD = 1.5  # Standard deviation of an initial hyper-latent, in quantization steps.
_RIDGE = 0.1  # Of the fit, relative to a feature's variance.
_SMOOTH = np.array([0.25, 0.75, 0.75, 0.25, 0.0])  # Linear interpolation by 2, taps of SAME.
_MEAN_LOG_MAGNITUDE = -0.635  # Of a standard normal number.


def is_known(analysis: Layer, synthesis: Layer) -> bool:
  """Whether these are a hyper-analysis and -synthesis that `initialise` knows how to fill."""
  return _shape_of(analysis, Conv2D) == [(3, 1), (5, 2), (5, 2)] and _shape_of(
    synthesis, Conv2DTranspose
  ) == [(5, 2), (5, 2), (3, 1)]


def initialise(analysis: Layer, synthesis: Layer, y: np.ndarray, noise: float = 0.1) -> None:
  """Sets the kernels and biases.

  Args:
    analysis: Three `Conv2D` as `HyperAnalysis` has them.
    synthesis: Three `Conv2DTranspose` as `HyperSynthesis` has them.
    y: [B, h, w, C] latents, C as many as the analysis takes.
    noise: Standard deviation of the rest of the kernels, relative to 1 / sqrt(fan in).
  """
  down, up = _layers(analysis), _layers(synthesis)
  groups = min(c.out_channels for c in (*down[:2], up[0], up[1])) // 2
  groups = min(groups, down[2].out_channels, y.shape[3])
  mean, spread = y.mean(axis=(0, 1, 2)), np.maximum(y.std(axis=(0, 1, 2)), 0.1)
  random = np.random.default_rng(0)
  member = np.arange(y.shape[3]) * groups // y.shape[3]
  sizes = np.bincount(member, minlength=groups)
  signs = random.choice([-1.0, 1.0], y.shape[3])
  project = np.zeros([y.shape[3], groups])
  project[np.arange(len(member)), member] = signs / spread / np.sqrt(sizes[member])
  one = np.eye(groups)
  pair, unpair = np.concatenate([one, -one], 1), np.concatenate([one, -one], 0)
  smooth = np.outer(_SMOOTH, _SMOOTH)
  centre = np.zeros([3, 3])
  centre[1, 1] = 1.0
  # |x| of normalised projections, then its mean over a neighbourhood.
  both = np.concatenate([project, -project], 1)
  _set(down[0], centre, both, -mean @ both, noise, random)
  _set(down[1], smooth / 4, np.concatenate([one, one], 0), np.zeros(groups), noise, random)
  _set(down[2], smooth / 4, one, np.zeros(groups), 0.0, random)
  z = analysis(tf.constant(y)).numpy()[..., :groups]
  gain = _SPREAD / np.maximum(z.std(axis=(0, 1, 2)), 0.05)
  _set(down[2], smooth / 4, np.diag(gain), -gain * z.mean(axis=(0, 1, 2)), noise, random)
  # Back to the latents' grid, signed values as pairs, and from there to log scales.
  _set(up[0], smooth, pair, np.zeros(2 * groups), noise, random)
  _set(up[1], smooth, unpair @ pair, np.zeros(2 * groups), noise, random)
  rounded = tf.round(analysis(tf.constant(y)))
  features = up[1](up[0](rounded)).numpy()[..., : 2 * groups] @ unpair
  features = features[:, : y.shape[1], : y.shape[2]].reshape(-1, groups)
  deviation = (y - mean).reshape(-1, y.shape[3])
  target = np.log(np.maximum(np.abs(deviation), 0.1 * spread)) - _MEAN_LOG_MAGNITUDE
  centred = features - features.mean(axis=0)
  gram = centred.T @ centred
  # The last term alone where no feature varies (one flat picture).
  gram += (_RIDGE * np.trace(gram) / groups + 1e-3 * len(centred)) * np.eye(groups)
  slope = np.linalg.solve(gram, centred.T @ (target - target.mean(axis=0)))
  predicted = features @ slope
  # The scales' level by likelihood: the mean square of what is left is 1.
  level = 0.5 * np.log(np.maximum(np.mean(deviation**2 * np.exp(-2 * predicted), axis=0), 0.01))
  weights = np.concatenate([np.zeros_like(slope), slope], axis=1)
  _set(up[2], centre, unpair @ weights, np.concatenate([mean, level]), noise / 10, random)


def _layers(transform: Layer) -> list[Any]:
  return list(transform.layers) if isinstance(transform, Sequential) else [transform]


def _shape_of(transform: Layer, convolution: type) -> list[tuple[int, int]]:
  layers = _layers(transform)
  if not all(isinstance(c, convolution) and getattr(c, "use_bias", False) for c in layers):
    return []
  relu = [getattr(c, "activation", None) is tf.nn.relu for c in layers]
  return [(c.kernel_size, c.stride) for c in layers] if relu == [True, True, False] else []


def _set(
  layer: Any,
  taps: np.ndarray,
  channels: np.ndarray,
  bias: np.ndarray,
  noise: float,
  random: np.random.Generator,
) -> None:
  """kernel[:, :, i, o] = taps * channels[i, o] for the first channels, and noise for the others."""
  shape = tuple(layer.kernel.shape)
  kernel = random.normal(0, noise / np.sqrt(np.prod(shape[:3])), shape)
  count_in, count_out = channels.shape
  kernel[:, :, :, :count_out] = 0
  kernel[:, :, :count_in, :count_out] = taps[:, :, None, None] * channels
  whole = np.zeros(shape[3])
  whole[: len(bias)] = bias
  layer.kernel.assign(kernel.astype(np.float32))
  layer.bias.assign(whole.astype(np.float32))
