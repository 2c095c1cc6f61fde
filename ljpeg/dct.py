"""JPEG's lossy part, differentiable: colours, block DCT, tables, rounding, and the way back.

Coefficients of a block are in zigzag order here, [..., 64], the order in which files code them;
`ZIGZAG` leads to JPEG's natural order (row by row). Planes are [B, H, W], blocks [B, H/8, W/8, 64].
"""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

SUBSAMPLINGS = ("4:4:4", "4:2:0")

# How gradients pass the rounding of coefficients; the forward pass always rounds.
ROUNDINGS = ("cubic", "ste", "exact")


def _zigzag() -> np.ndarray:
  """Natural index (8 * row + column) of each zigzag position, [64]."""
  positions = [(r, c) for r in range(8) for c in range(8)]
  positions.sort(key=lambda p: (p[0] + p[1], p[0] if (p[0] + p[1]) % 2 else p[1]))
  return np.array([8 * r + c for r, c in positions])


ZIGZAG = _zigzag()
NATURAL = np.argsort(ZIGZAG)  # Zigzag position of each natural index.


def _basis() -> np.ndarray:
  """[64 pixels of a block in natural order, 64 frequencies in zigzag order], orthonormal."""
  n = np.arange(8)
  one = np.cos(np.pi * (2 * n[None, :] + 1) * n[:, None] / 16) * math.sqrt(2 / 8)
  one[0] /= math.sqrt(2)
  two = np.einsum("uy,vx->yxuv", one, one).reshape(64, 64)
  return two[:, ZIGZAG].astype(np.float32)


_BASIS = _basis()

# JFIF (ITU-R T.871): RGB -> Y, Cb, Cr, all without the offset of 128 for colours.
_TO_YCC = np.array(
  [
    [0.299, 0.587, 0.114],
    [-0.299 / 1.772, -0.587 / 1.772, 0.886 / 1.772],
    [0.701 / 1.402, -0.587 / 1.402, -0.114 / 1.402],
  ],
  np.float64,
)
_TO_RGB = np.linalg.inv(_TO_YCC)

# Squared error of RGB (mean over the three channels) that a unit of squared error in Y, Cb, Cr
# makes: Cb's and Cr's common part in green is left out.
COLOUR_WEIGHTS = tuple(float(w) for w in np.mean(_TO_RGB**2, axis=0))


# Example tables of the standard (ITU-T T.81, Annex K.1), luminance and chrominance, row by row:
# what the Independent JPEG Group's qualities scale.
# fmt: off
_ANNEX_K = np.array([
  [
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
  ], [
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
  ],
], np.float32)
# fmt: on


def standard_tables(quality: tf.Tensor) -> tf.Tensor:
  """The Independent JPEG Group's tables of a quality: float32 [2, 64] in zigzag order, 1..255.

  `quality`: a whole number from 1 to 100, as float32 or int. Most encoders' default tables.
  """
  quality = tf.cast(quality, tf.float32)
  scale = tf.where(quality < 50, tf.floor(5000.0 / quality), 200.0 - 2.0 * quality)
  scaled = tf.floor((tf.constant(_ANNEX_K[:, ZIGZAG]) * scale + 50.0) / 100.0)
  return tf.clip_by_value(scaled, 1.0, 255.0)


def rgb_to_ycc(x: tf.Tensor) -> tf.Tensor:
  """RGB in 0..255 to Y - 128, Cb - 128, Cr - 128, each in -128..128: [..., 3] to [..., 3]."""
  ycc = tf.tensordot(x, tf.constant(_TO_YCC.T, x.dtype), 1)
  return ycc - tf.constant([128.0, 0.0, 0.0], x.dtype)


def ycc_to_rgb(ycc: tf.Tensor) -> tf.Tensor:
  """The inverse of `rgb_to_ycc`, not clipped."""
  ycc = ycc + tf.constant([128.0, 0.0, 0.0], ycc.dtype)
  return tf.tensordot(ycc, tf.constant(_TO_RGB.T, ycc.dtype), 1)


def to_blocks(plane: tf.Tensor) -> tf.Tensor:
  """DCT of 8x8 blocks: [B, H, W], sides multiples of 8, to [B, H/8, W/8, 64] in zigzag order.

  Orthonormal: a flat block of value v has the first coefficient 8 v, as JPEG has it.
  """
  return tf.tensordot(tf.nn.space_to_depth(plane[..., None], 8), tf.constant(_BASIS), 1)


def from_blocks(blocks: tf.Tensor) -> tf.Tensor:
  """The inverse of `to_blocks`."""
  pixels = tf.tensordot(blocks, tf.constant(_BASIS.T), 1)
  return tf.nn.depth_to_space(pixels, 8)[..., 0]


def pad_edge(x: tf.Tensor, factor: int) -> tf.Tensor:
  """Repeats the last row and column until the sides of [B, H, W, C] are multiples of `factor`."""
  for axis in (1, 2):
    size = tf.shape(x)[axis]
    wanted = -(-size // factor) * factor
    x = tf.gather(x, tf.minimum(tf.range(wanted), size - 1), axis=axis)
  return x


def halve(plane: tf.Tensor) -> tf.Tensor:
  """Means of 2x2 samples, [B, H, W] to [B, H/2, W/2], as encoders make 4:2:0."""
  return tf.nn.avg_pool2d(plane[..., None], 2, 2, "VALID")[..., 0]


def double(plane: tf.Tensor) -> tf.Tensor:
  """[B, H, W] to [B, 2H, 2W] with weights 3/4 and 1/4, edges repeated: libjpeg's "fancy" one."""
  for axis in (1, 2):
    size = tf.shape(plane)[axis]
    index = tf.range(size)
    before = tf.gather(plane, tf.maximum(index - 1, 0), axis=axis)
    after = tf.gather(plane, tf.minimum(index + 1, size - 1), axis=axis)
    both = tf.stack([0.75 * plane + 0.25 * before, 0.75 * plane + 0.25 * after], axis=axis + 1)
    shape = tf.concat([tf.shape(plane)[:axis], [2 * size], tf.shape(plane)[axis + 1 :]], 0)
    plane = tf.reshape(both, shape)
  return plane


def analyse(x: tf.Tensor, subsampling: str) -> list[tf.Tensor]:
  """DCT coefficients of Y, Cb, Cr.

  Args:
    x: [B, H, W, 3] RGB in 0..255, any size; edges are repeated to the block grid.
    subsampling: One of SUBSAMPLINGS.

  Returns:
    Three tensors [B, ceil(H/8), ceil(W/8), 64]; with 4:2:0 Y's sides are even and those of Cb and
    Cr the half.
  """
  x = pad_edge(x, 16 if subsampling == "4:2:0" else 8)
  y, cb, cr = tf.unstack(rgb_to_ycc(x), axis=-1)
  if subsampling == "4:2:0":
    cb, cr = halve(cb), halve(cr)
  return [to_blocks(plane) for plane in (y, cb, cr)]


@tf.custom_gradient
def _as_bytes(plane: tf.Tensor):
  """Rounds halves up and clips to -128..127; the gradient passes where nothing is clipped."""
  inside = tf.logical_and(plane >= -128.0, plane <= 127.0)
  rounded = tf.clip_by_value(tf.floor(plane + 0.5), -128.0, 127.0)
  return rounded, lambda dy: tf.where(inside, dy, tf.zeros_like(dy))


def synthesise(coefficients: Sequence[tf.Tensor], subsampling: str) -> tf.Tensor:
  """Pixels of dequantized coefficients, clipped: [B, H, W, 3] in 0..255, whole blocks.

  Planes are rounded to bytes before the colours are converted, as decoders do; gradients pass
  straight through.
  """
  planes = (from_blocks(c) for c in coefficients)
  y, cb, cr = (_as_bytes(p) for p in planes)
  if subsampling == "4:2:0":
    cb, cr = double(cb), double(cr)
  return tf.clip_by_value(ycc_to_rgb(tf.stack([y, cb, cr], axis=-1)), 0.0, 255.0)


@tf.custom_gradient
def round_ste(z: tf.Tensor):
  """Rounds; the gradient passes straight through."""
  return tf.round(z), lambda dy: dy


@tf.custom_gradient
def round_cubic(z: tf.Tensor):
  """Rounds; backward 3 (z - round z)^2, the slope of round(z) + (z - round z)^3.

  Shin and Song 2017, "JPEG-resistant adversarial images".
  """
  rounded = tf.round(z)
  return rounded, lambda dy: dy * 3.0 * tf.square(z - rounded)


@tf.custom_gradient
def round_sharp(z: tf.Tensor):
  """Rounds; backward 7 (2 (z - round z))^6: almost only what is about to change its value counts.

  Averaged over values that are spread evenly the gradient is 1, as that of rounding.
  """
  rounded = tf.round(z)
  return rounded, lambda dy: dy * 7.0 * tf.pow(2.0 * (z - rounded), 6)


@tf.custom_gradient
def _within(x: tf.Tensor, low: float, high: float):
  """Clips; outside, the gradient passes where a step against it leads back inside."""

  def grad(dy: tf.Tensor):
    stuck = tf.logical_or(
      tf.logical_and(x < low, dy > 0), tf.logical_and(x > high, dy < 0)
    )  # A step goes against the gradient.
    return tf.where(stuck, tf.zeros_like(dy), dy), None, None

  return tf.clip_by_value(x, low, high), grad


class Tables(tf.Module):
  """Two quantization tables, luminance and chrominance, as baseline JPEG has them.

  The variable is the logarithm: steps are relative, alike for small and large entries.

  Attributes:
    log_steps: [2, 64] in zigzag order, divided by the learning rate factor.
  """

  def __init__(
    self, initial: np.ndarray, trainable: bool = True, learning_rate_factor: float = 1.0
  ):
    """Makes the variable.

    Args:
      initial: [2, 64] in zigzag order, clipped to 1..255.
      trainable: Whether they are learned.
      learning_rate_factor: How much faster the logarithms move than other variables do.

    Raises:
      ValueError: The factor is not over 0.
    """
    super().__init__(name="tables")
    if not learning_rate_factor > 0:
      raise ValueError(f"tables.learning_rate_factor must be over 0, not {learning_rate_factor}.")
    self._factor = float(learning_rate_factor)
    steps = np.clip(np.asarray(initial, np.float64), 1, 255)
    self.log_steps = tf.Variable(
      np.log(steps) / self._factor, dtype=tf.float32, trainable=trainable, name="log_steps"
    )

  def __call__(self) -> tf.Tensor:
    """The integers, float32 [2, 64] in 1..255; gradients pass the rounding straight through."""
    return round_ste(tf.exp(_within(self._factor * self.log_steps, 0.0, math.log(255.0))))

  def integers(self) -> np.ndarray:
    """The same as uint8 [2, 64] in zigzag order."""
    return self().numpy().astype(np.uint8)
