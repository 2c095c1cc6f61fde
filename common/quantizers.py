"""Quantizers: each returns the pair (rate, decode), so that no model needs a branch per method.

| name       | rate          | decode        | source |
|------------|---------------|---------------|--------|
| unoise     | y + u         | y + u         | Ballé et al. 2017, eq. 10 |
| mixedq     | y + u         | rounded, STE  | Minnen and Singh 2020, section 3.3 |
| gnoise     | y + n         | y + n         | Kingma and Welling 2014, section 2.4 |
| ste        | rounded, STE  | rounded, STE  | Bengio et al. 2013; Yang et al. 2020, A2 |
| danneal    | s             | s             | Yang et al. 2020, A4 |
| soft_round | s             | s             | Agustsson and Theis 2020, section 4 |
| sga        | s             | s             | Yang et al. 2020, eq. 8 |
| sga_linear, sga_cosine, sga_ssl    | s | s | SGA+, Perugachi-Diaz et al. 2024 |
| sga3_linear, sga3_cosine, sga3_ssl | s | s | the same, three classes |
| round      | rounded       | rounded       | evaluation |

u is uniform in -1/2..1/2; n is standard normal, for latents in units of their posterior's
deviation.
"Rounded" is round(y - offset) + offset, STE passes the gradient straight through. s is a relaxed
sample that becomes the rounded value as the temperature tau falls to 0. Those of SGA draw between
grid points: a point at distance d from v = y - offset has the probability f(d)^(1/tau), up to a
factor that makes them sum to 1, a Gumbel-softmax of temperature tau draws weights, and s is the
weighted sum of the points. The methods differ in log f and in the points.

    make = make_quantizer("sga")                     # once, outside of the loop
    quantizer = make(seed=(seed, step), temperature=0.3)
    rate, decode = quantizer("y", loc, offset)
"""

import inspect
import math
import zlib
from collections.abc import Mapping
from typing import Callable, Optional, Union

import tensorflow as tf

from common.codec import Quantized, Quantizer

Seed = Union[tf.Tensor, tuple[int, int]]
MakeQuantizer = Callable[..., Quantizer]

_FUNCTIONS: dict[str, Callable[..., Quantized]] = {}


# Those whose rate and gradients a training can use.
FOR_TRAINING = ("mixedq", "unoise", "gnoise")

# Those that are published for iterative inference, and the temperature at which each begins, None
# where it has none. 0.5 and 0.2: Yang et al. 2020; 1: SGA+; soft_round: as sga, chosen here.
# Without "round", which has no gradient, and "mixedq", a compromise for training: where only the
# latents move, the rate can be that of rounded latents too, as in "ste".
FOR_ITERATIVE_INFERENCE: Mapping[str, Optional[float]] = {
  "danneal": 0.2,
  "sga": 0.5,
  "sga3_cosine": 1.0,
  "sga3_linear": 1.0,
  "sga3_ssl": 1.0,
  "sga_cosine": 1.0,
  "sga_linear": 1.0,
  "sga_ssl": 1.0,
  "soft_round": 0.5,
  "ste": None,
  "unoise": None,
}


def known_quantizers() -> list[str]:
  """The names that `make_quantizer` takes."""
  return sorted(_FUNCTIONS)


def for_validation(name: str) -> str:
  """What a training with quantizer `name` is validated with: rounding, but `gnoise` for itself."""
  return name if name == "gnoise" else "round"


def parameters(name: str) -> dict[str, float]:
  """The parameters that quantizer `name` takes, with their defaults; often none."""
  return {
    key: parameter.default
    for key, parameter in inspect.signature(_function(name)).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
  }


def make_quantizer(name: str, **options: float) -> MakeQuantizer:
  """The factory of quantizers called `name`.

  `factory(seed=None, temperature=None, share_noise=False, rows=None)`: `seed` is int32 [2] and
  alone determines the noise; `temperature` a scalar in (0, 1]; `share_noise` gives all images of a
  batch the same noise, so that none depends on the batch that it is in; `rows` = (first, total)
  says that the images are those from row `first` on of a batch of `total`, and gives them its
  noise. Quantizers that need none of them ignore them.

  Args:
    name: One of `known_quantizers()`.
    **options: Instead of the defaults in `parameters(name)`.

  Raises:
    ValueError: No such quantizer, or it has no such parameter; the message lists the known ones.
  """
  function = _function(name)
  for key in options:
    if key not in parameters(name):
      takers = [n for n in known_quantizers() if key in parameters(n)]
      raise ValueError(
        f"The quantizer {name!r} has no parameter {key!r}. "
        f"It takes: {', '.join(parameters(name)) or 'none'}; "
        f"{key!r} belongs to: {', '.join(takers) or 'none'}."
      )

  def factory(
    seed: Optional[Seed] = None,
    temperature: Optional[tf.Tensor] = None,
    share_noise: bool = False,
    rows: Optional[tuple[tf.Tensor, int]] = None,
  ) -> Quantizer:
    def quantizer(name: str, loc: tf.Tensor, offset: tf.Tensor) -> Quantized:
      return function(loc, offset, _uniform(seed, name, share_noise, rows), temperature, **options)

    return quantizer

  return factory


def _function(name: str) -> Callable[..., Quantized]:
  if name not in _FUNCTIONS:
    raise ValueError(f"Unknown quantizer {name!r}. Known: {', '.join(known_quantizers())}.")
  return _FUNCTIONS[name]


def _register(name: str) -> Callable[[Callable[..., Quantized]], Callable[..., Quantized]]:
  """Names a function (loc, offset, uniform, temperature, *, parameters) -> Quantized."""

  def decorate(function: Callable[..., Quantized]) -> Callable[..., Quantized]:
    _FUNCTIONS[name] = function
    return function

  return decorate


def _uniform(
  seed: Optional[Seed],
  latent: str,
  share: bool = False,
  rows: Optional[tuple[tf.Tensor, int]] = None,
) -> Callable[[tf.Tensor], tf.Tensor]:
  """Draws from [0, 1), a pure function of the seed, the latent's name and the shape."""

  def draw(like: tf.Tensor) -> tf.Tensor:
    if seed is None:
      raise ValueError("This quantizer draws noise: give it a seed.")
    key = tf.convert_to_tensor(seed, tf.int32)
    # One stream a latent: same seed, other name, independent noise.
    key = tf.bitwise.bitwise_xor(key, tf.constant([0, zlib.crc32(latent.encode()) >> 1], tf.int32))
    shape = tf.shape(like)
    if rows is not None and not share:
      first, total = rows
      batch = tf.random.stateless_uniform(tf.concat([[total], shape[1:]], 0), key, dtype=like.dtype)
      return tf.ensure_shape(batch[first : first + shape[0]], like.shape)
    if not share:
      return tf.random.stateless_uniform(shape, key, dtype=like.dtype)
    one = tf.random.stateless_uniform(shape[1:], key, dtype=like.dtype)
    return tf.broadcast_to(one, shape)

  return draw


def _temperature(temperature: Optional[tf.Tensor], dtype: tf.DType) -> tf.Tensor:
  if temperature is None:
    raise ValueError("This quantizer needs a temperature.")
  return tf.cast(temperature, dtype)


def _rounded(loc: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
  return tf.round(loc - offset) + offset


def _straight_through(loc: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
  return loc + tf.stop_gradient(_rounded(loc, offset) - loc)


@_register("unoise")
def _unoise(loc, offset, uniform, temperature):
  del offset, temperature
  noisy = loc + (uniform(loc) - 0.5)
  return Quantized(rate=noisy, decode=noisy)


@_register("mixedq")
def _mixedq(loc, offset, uniform, temperature):
  del temperature
  return Quantized(rate=loc + (uniform(loc) - 0.5), decode=_straight_through(loc, offset))


@_register("gnoise")
def _gnoise(loc, offset, uniform, temperature):
  del offset, temperature
  noisy = loc + tf.math.ndtri(tf.clip_by_value(uniform(loc), _TINY, 1 - _TINY))
  return Quantized(rate=noisy, decode=noisy)


@_register("ste")
def _ste(loc, offset, uniform, temperature):
  del uniform, temperature
  rounded = _straight_through(loc, offset)
  return Quantized(rate=rounded, decode=rounded)


@_register("round")
def _round(loc, offset, uniform, temperature):
  del uniform, temperature
  rounded = _rounded(loc, offset)
  return Quantized(rate=rounded, decode=rounded)


# Distances to grid points are kept this far from 0 and 1, where log f or its slope is infinite.
_EDGE = 1e-5
# And uniform noise this far: the largest float32 below 1 is 1 - 6e-8.
_TINY = 1e-7

LogWeight = Callable[[tf.Tensor], tf.Tensor]


def _log_atanh(distance: tf.Tensor) -> tf.Tensor:
  """log f of SGA: -atanh(d)."""
  return -tf.atanh(tf.minimum(distance, 1 - _EDGE))


def _log_linear(distance: tf.Tensor) -> tf.Tensor:
  """log f of SGA+, linear: log(1 - d). At tau = 1 and with two points, E[s] = v."""
  return tf.math.log(tf.maximum(1 - distance, _EDGE))


def _log_cosine(distance: tf.Tensor) -> tf.Tensor:
  """log f of SGA+, cosine: log cos^2(pi d / 2), as a sine, which is exact where it is small."""
  return 2 * tf.math.log(tf.sin(math.pi / 2 * tf.maximum(1 - distance, _EDGE)))


def _log_ssl(scale: float) -> LogWeight:
  """log f of SGA+, sigmoid scaled logit: log sigmoid(-a logit d)."""

  def log_weight(distance: tf.Tensor) -> tf.Tensor:
    d = tf.clip_by_value(distance, _EDGE, 1 - _EDGE)
    return tf.math.log_sigmoid(-scale * (tf.math.log(d) - tf.math.log1p(-d)))

  return log_weight


def _two_points(loc, offset, temperature, log_weight: LogWeight, uniform=None) -> Quantized:
  """A relaxed draw between the grid points below and above; without `uniform`, no draw.

  With two classes the Gumbel-softmax is a sigmoid: the difference of two Gumbel variables is a
  logistic one.
  """
  tau = _temperature(temperature, loc.dtype)
  v = loc - offset
  down = tf.floor(v)
  r = v - down
  logit_up = (log_weight(1 - r) - log_weight(r)) / tau
  if uniform is not None:
    u = tf.clip_by_value(uniform(v), _TINY, 1 - _TINY)
    logit_up = (logit_up + tf.math.log(u) - tf.math.log1p(-u)) / tau
  sample = down + tf.sigmoid(logit_up) + offset
  return Quantized(rate=sample, decode=sample)


def _three_points(
  loc, offset, uniform, temperature, log_weight: LogWeight, factor: float, power: float
) -> Quantized:
  """A relaxed draw between the nearest grid point and its two neighbours.

  The neighbour on the far side is 1 to 1.5 away, where f is not defined: f(min(factor d, 1))^power
  takes its place, which reaches its least value at d = 1 / factor.
  """
  tau = _temperature(temperature, loc.dtype)
  v = loc - offset
  nearest = tf.round(v)
  points = tf.constant([-1.0, 0.0, 1.0], loc.dtype)
  distance = tf.abs((v - nearest)[..., None] - points)
  logits = power * log_weight(tf.minimum(factor * distance, 1.0)) / tau
  u = tf.clip_by_value(uniform(logits), _TINY, 1 - _TINY)
  weights = tf.nn.softmax((logits - tf.math.log(-tf.math.log(u))) / tau)
  sample = nearest + tf.reduce_sum(weights * points, axis=-1) + offset
  return Quantized(rate=sample, decode=sample)


@_register("sga")
def _sga(loc, offset, uniform, temperature):
  """Stochastic Gumbel annealing, Yang, Bamler and Mandt 2020.

  With r = v - floor(v), the logits of rounding down and up are -atanh(r) / tau and
  -atanh(1 - r) / tau.
  """
  return _two_points(loc, offset, temperature, _log_atanh, uniform)


@_register("danneal")
def _danneal(loc, offset, uniform, temperature):
  """Deterministic annealing, A4 of Yang, Bamler and Mandt 2020: SGA without the Gumbel noise.

  The weight of rounding up is the softmax of the same logits,
  sigmoid((atanh(r) - atanh(1 - r)) / tau): the expectation of hard stochastic rounding.
  """
  del uniform
  return _two_points(loc, offset, temperature, _log_atanh)


@_register("sga_linear")
def _sga_linear(loc, offset, uniform, temperature):
  """SGA+, linear: logits log(1 - r) / tau and log(r) / tau."""
  return _two_points(loc, offset, temperature, _log_linear, uniform)


@_register("sga_cosine")
def _sga_cosine(loc, offset, uniform, temperature):
  """SGA+, cosine: logits log cos^2(pi r / 2) / tau and log cos^2(pi (1 - r) / 2) / tau."""
  return _two_points(loc, offset, temperature, _log_cosine, uniform)


@_register("sga_ssl")
def _sga_ssl(loc, offset, uniform, temperature, *, sigmoid_scale=2.3):
  """SGA+, sigmoid scaled logit: logits log sigmoid(-+ a logit r) / tau, a = `sigmoid_scale`.

  a = 1 is `sga_linear`; a larger a is steeper in the middle and flatter at the grid points.
  """
  return _two_points(loc, offset, temperature, _log_ssl(sigmoid_scale), uniform)


# Three classes: the authors' values for linear, whose factor serves the others too.
@_register("sga3_linear")
def _sga3_linear(
  loc, offset, uniform, temperature, *, three_class_factor=0.98, three_class_power=1.5
):
  """SGA+ with three classes, linear."""
  f = _log_linear
  return _three_points(loc, offset, uniform, temperature, f, three_class_factor, three_class_power)


@_register("sga3_cosine")
def _sga3_cosine(
  loc, offset, uniform, temperature, *, three_class_factor=0.98, three_class_power=1.0
):
  """SGA+ with three classes, cosine; the power is that of cos^2."""
  f = _log_cosine
  return _three_points(loc, offset, uniform, temperature, f, three_class_factor, three_class_power)


@_register("sga3_ssl")
def _sga3_ssl(
  loc,
  offset,
  uniform,
  temperature,
  *,
  sigmoid_scale=1.4,
  three_class_factor=0.98,
  three_class_power=1.5,
):
  """SGA+ with three classes, sigmoid scaled logit."""
  f = _log_ssl(sigmoid_scale)
  return _three_points(loc, offset, uniform, temperature, f, three_class_factor, three_class_power)


@_register("soft_round")
def _soft_round(loc, offset, uniform, temperature):
  """Soft rounding, uniform noise, conditional expectation: Agustsson and Theis 2020, section 4.

  With r = x - floor(x) - 1/2, s(x) = floor(x) + 1/2 + tanh(alpha r) / (2 tanh(alpha / 2)), and
  E[x | s(x) + u = t] = s^-1(t - 1/2) + 1/2 for an x that is uniform around t; the result is this
  expectation at t = s(v) + u. The sharpness is alpha = 1 / tau: as tau falls the result goes from
  near v + u (`unoise`; tau = 0.5 is alpha = 2) to round(v), for rate and synthesis alike. That is
  why the noise is there: s(v) alone would leave the latents between the grid points, at values
  that the prior and the synthesis have never seen, for as long as s is soft.
  """
  alpha = 1 / _temperature(temperature, loc.dtype)
  steepness = tf.tanh(alpha / 2)
  v = loc - offset
  down = tf.floor(v)
  soft = 0.5 + 0.5 * tf.tanh(alpha * (v - down - 0.5)) / steepness
  shifted = soft + uniform(v) - 1  # s(v) + u - 1/2 - down, u in [-1/2, 1/2).
  below = tf.minimum(tf.floor(shifted), 0.0)  # -1 or 0, also where the sum was rounded up to 1.
  slope = tf.clip_by_value(2 * steepness * (shifted - below - 0.5), _TINY - 1, 1 - _TINY)
  sample = down + below + 1 + tf.atanh(slope) / alpha + offset
  return Quantized(rate=sample, decode=sample)
