"""Quantizers: each returns the pair (rate, decode), so that no model needs a branch per method.

| name      | rate           | decode          | for |
|-----------|----------------|-----------------|-----|
| unoise    | y + u          | y + u           | training (Ballé et al. 2017, eq. 10) |
| mixedq    | y + u          | rounded, STE    | training (Minnen and Singh 2020, section 3.3) |
| ste       | rounded, STE   | rounded, STE    | iterative inference |
| sga       | s              | s               | iterative inference (Yang et al. 2020, eq. 8) |
| round     | rounded        | rounded         | evaluation |

"Rounded" is round(y - offset) + offset, STE passes the gradient straight through.

    make = make_quantizer("sga")                     # once, outside of the loop
    quantizer = make(seed=(seed, step), temperature=0.3)
    rate, decode = quantizer("y", loc, offset)
"""

import zlib
from typing import Callable, Optional, Union

import tensorflow as tf

from common.codec import Quantized, Quantizer

Seed = Union[tf.Tensor, tuple[int, int]]
MakeQuantizer = Callable[..., Quantizer]

_QUANTIZERS: dict[str, MakeQuantizer] = {}


# Those whose rate and gradients a training can use.
FOR_TRAINING = ("mixedq", "unoise")


def known_quantizers() -> list[str]:
  """The names that `make_quantizer` takes."""
  return sorted(_QUANTIZERS)


def make_quantizer(name: str) -> MakeQuantizer:
  """The factory of quantizers called `name`: `factory(seed=None, temperature=None)`.

  `seed` is int32 [2] and alone determines the noise; `temperature` a scalar in (0, 1]. Quantizers
  that need none of them ignore them.

  Raises:
    ValueError: No such quantizer; the message lists the known ones.
  """
  if name not in _QUANTIZERS:
    raise ValueError(f"Unknown quantizer {name!r}. Known: {', '.join(known_quantizers())}.")
  return _QUANTIZERS[name]


def _register(name: str) -> Callable[[Callable[..., Quantized]], Callable[..., Quantized]]:
  def decorate(function: Callable[..., Quantized]) -> Callable[..., Quantized]:
    def factory(seed: Optional[Seed] = None, temperature: Optional[tf.Tensor] = None) -> Quantizer:
      def quantizer(name: str, loc: tf.Tensor, offset: tf.Tensor) -> Quantized:
        return function(loc, offset, _uniform(seed, name), temperature)

      return quantizer

    _QUANTIZERS[name] = factory
    return function

  return decorate


def _uniform(seed: Optional[Seed], latent: str) -> Callable[[tf.Tensor], tf.Tensor]:
  """Draws from [0, 1), a pure function of the seed, the latent's name and the shape."""

  def draw(like: tf.Tensor) -> tf.Tensor:
    if seed is None:
      raise ValueError("This quantizer draws noise: give it a seed.")
    key = tf.convert_to_tensor(seed, tf.int32)
    # One stream a latent: same seed, other name, independent noise.
    key = tf.bitwise.bitwise_xor(key, tf.constant([0, zlib.crc32(latent.encode()) >> 1], tf.int32))
    return tf.random.stateless_uniform(tf.shape(like), key, dtype=like.dtype)

  return draw


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


@_register("sga")
def _sga(loc, offset, uniform, temperature):
  """Stochastic Gumbel annealing, Yang, Bamler and Mandt 2020.

  With r = v - floor(v), the logits of rounding down and up are -atanh(r) / tau and
  -atanh(1 - r) / tau, and a Gumbel-softmax of temperature tau draws between them. With two classes
  that is a sigmoid: the difference of two Gumbel variables is a logistic one.
  """
  if temperature is None:
    raise ValueError("The quantizer 'sga' needs a temperature.")
  tau = tf.cast(temperature, loc.dtype)
  v = loc - offset
  down = tf.floor(v)
  r = v - down
  limit = 1 - 1e-5
  up_minus_down = tf.atanh(tf.minimum(r, limit)) - tf.atanh(tf.minimum(1 - r, limit))
  tiny = 1e-7
  u = tf.clip_by_value(uniform(loc), tiny, 1 - tiny)
  logistic = tf.math.log(u) - tf.math.log1p(-u)
  weight_up = tf.sigmoid((up_minus_down / tau + logistic) / tau)
  sample = down + weight_up + offset
  return Quantized(rate=sample, decode=sample)
