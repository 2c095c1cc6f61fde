"""The rate-distortion walk that all loops share.

pad -> infer -> code -> synthesize -> unpad -> rate, distortion, loss
"""

from collections.abc import Mapping
from typing import NamedTuple, Optional

import numpy as np
import tensorflow as tf

from common.codec import Latents, Quantizer, TrainableCodec


class RDTerms(NamedTuple):
  """What a step costs and gives.

  Attributes:
    loss: Scalar: mean over the batch of bpp + rd_lambda * mse.
    bpp: [B] bits per pixel of the unpadded image.
    mse: [B] mean squared error on the 0..255 scale, not rounded.
    x_hat: [B, H, W, 3] float32 reconstruction, not rounded.
    parts: Further scalars that are logged by name: what else the loss is made of.
  """

  loss: tf.Tensor
  bpp: tf.Tensor
  mse: tf.Tensor
  x_hat: tf.Tensor
  parts: Optional[Mapping[str, tf.Tensor]] = None


def to_batch(image: np.ndarray) -> tf.Tensor:
  """uint8 [H, W, 3] to float32 [1, H, W, 3] in 0..255.

  Raises:
    ValueError: Another shape or type, or an empty image.
  """
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
    raise ValueError(
      f"An image is uint8 [H, W, 3] with H, W >= 1; this is {image.dtype} {list(image.shape)}."
    )
  return tf.constant(image[None], tf.float32)


def to_image(x: tf.Tensor) -> np.ndarray:
  """float32 [1, H, W, 3] or [H, W, 3] to uint8 [H, W, 3], rounded and clipped to 0..255."""
  array = np.asarray(x)
  array = array[0] if array.ndim == 4 else array
  return np.clip(np.round(np.nan_to_num(array)), 0, 255).astype(np.uint8)


def padded_size(size: int, factor: int) -> int:
  """The next multiple of `factor`."""
  return -(-size // factor) * factor


def pad(x: tf.Tensor, factor: int) -> tf.Tensor:
  """Pads at the bottom and the right to multiples of `factor`: reflected, else the edge repeated.

  `x`: [B, H, W, C] of static H, W. Reflection needs a side longer than the padding; shorter sides
  repeat their last row or column.
  """
  for axis in (1, 2):
    size = int(x.shape[axis])
    wanted = padded_size(size, factor)
    if wanted == size:
      continue
    index = np.arange(wanted)
    reflects = wanted - size < size
    index = np.where(index < size, index, 2 * (size - 1) - index if reflects else size - 1)
    x = tf.gather(x, index, axis=axis)
  return x


def infer(codec: TrainableCodec, x: tf.Tensor) -> Latents:
  """Latents of images of one size. `x`: [B, H, W, 3] float32 in 0..255, any H, W."""
  return codec.graph("infer")(pad(x, codec.downsample_factor))


def synthesize(
  codec: TrainableCodec, decode: dict[str, tf.Tensor], size: tuple[int, int]
) -> tf.Tensor:
  """Pixels of decoded latents, cropped to `size` (height, width): [B, H, W, 3] float32."""
  return codec.graph("synthesize")(decode)[:, : size[0], : size[1]]


def rd_terms(
  codec: TrainableCodec, x: tf.Tensor, rd_lambda: tf.Tensor, quantizer: Quantizer
) -> RDTerms:
  """The training objective of a batch. `x`: [B, H, W, 3] float32 in 0..255, static H, W."""
  return rd_terms_of(codec, codec.infer(pad(x, codec.downsample_factor)), x, rd_lambda, quantizer)


def rd_terms_of(
  codec: TrainableCodec,
  latents: Latents,
  x: tf.Tensor,
  rd_lambda: tf.Tensor,
  quantizer: Quantizer,
) -> RDTerms:
  """The same for given latents, as iterative inference optimises them."""
  height, width = int(x.shape[1]), int(x.shape[2])
  coded = codec.code(latents, quantizer)
  x_hat = codec.synthesize(coded.decode)[:, :height, :width]
  bpp = tf.add_n(list(coded.bits.values())) / (height * width)
  mse = tf.reduce_mean(tf.math.squared_difference(x, x_hat), axis=[1, 2, 3])
  return RDTerms(tf.reduce_mean(bpp + rd_lambda * mse), bpp, mse, x_hat)
