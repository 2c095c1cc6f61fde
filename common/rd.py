"""The rate-distortion walk that all loops share.

pad -> infer -> code -> synthesize -> unpad -> rate, distortion, loss
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Callable, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from common import bitstream, tiling
from common.codec import Latent, Latents, Quantizer, TrainableCodec


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
  return tf.constant(check_image(image)[None], tf.float32)


def check_image(image: np.ndarray) -> np.ndarray:
  """The image, if it is uint8 [H, W, 3] and not empty; else raises ValueError."""
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
    raise ValueError(
      f"An image is uint8 [H, W, 3] with H, W >= 1; this is {image.dtype} {list(image.shape)}."
    )
  return image


def to_image(x: tf.Tensor) -> np.ndarray:
  """float32 [1, H, W, 3] or [H, W, 3] to uint8 [H, W, 3], rounded and clipped to 0..255."""
  array = np.asarray(x)
  array = array[0] if array.ndim == 4 else array
  return np.clip(np.round(np.nan_to_num(array)), 0, 255).astype(np.uint8)


def padded_size(size: int, factor: int) -> int:
  """The next multiple of `factor`."""
  return -(-size // factor) * factor


def latent_grid(codec: TrainableCodec, size: tuple[int, int]) -> tuple[int, int]:
  """Rows and columns of the coarsest latent of a picture of `size` (height, width).

  Raises:
    bitstream.BitstreamError: The picture, with its sides rounded up to `downsample_factor`, is
      larger than pictures may be: a single row of pixels can be that.
  """
  factor = codec.downsample_factor
  height, width = (padded_size(side, factor) for side in size)
  bitstream.check_size(height, width)
  return height // factor, width // factor


# Values of a latent that are worked on at once, where there are many.
_VALUES_AT_ONCE = 1 << 21


def bands(shape: Sequence[int]) -> Iterator[slice]:
  """Rows of a latent [B, h, w, C] that are worked on at once: all, unless it is large."""
  at_once = max(1, _VALUES_AT_ONCE // max(1, math.prod(shape) // shape[1]))
  for top in range(0, shape[1], at_once):
    yield slice(top, min(shape[1], top + at_once))


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
  """Latents of images of one size, in tiles where they are large (`common.tiling`).

  `x`: [B, H, W, 3] float32 in 0..255, any H, W.
  """
  factor = codec.downsample_factor
  size = (padded_size(int(x.shape[1]), factor), padded_size(int(x.shape[2]), factor))
  if x.shape[0] * size[0] * size[1] <= tiling.PIXELS_AT_ONCE:
    return codec.graph("infer")(pad(x, factor))

  def read(rows: np.ndarray, columns: np.ndarray) -> tf.Tensor:
    return tf.gather(tf.gather(x, rows, axis=1), columns, axis=2)

  return _infer_tiles(codec, read, (int(x.shape[1]), int(x.shape[2])), int(x.shape[0]))


def infer_image(codec: TrainableCodec, image: np.ndarray) -> Latents:
  """`infer` of one image, uint8 [H, W, 3]; a large one is never all in floating point.

  Raises:
    ValueError: It is no such image, or too large for a codec that cannot run in tiles.
  """
  image = check_image(image)
  factor = codec.downsample_factor
  size = tuple(padded_size(side, factor) for side in image.shape[:2])
  if size[0] * size[1] <= tiling.PIXELS_AT_ONCE:
    return infer(codec, to_batch(image))

  def read(rows: np.ndarray, columns: np.ndarray) -> tf.Tensor:
    return tf.constant(image[rows[:, None], columns][None], tf.float32)

  return _infer_tiles(codec, read, (image.shape[0], image.shape[1]), 1)


def _infer_tiles(
  codec: TrainableCodec,
  read: Callable[[np.ndarray, np.ndarray], tf.Tensor],
  size: tuple[int, int],
  batch: int,
) -> Latents:
  """`read` gives the pixels [B, rows, columns, 3] of these rows and columns."""
  windows = codec.analysis_windows()
  if windows is None:
    tiling.check_whole(size, f"this {codec.name} codec's encoder")
    x = read(np.arange(size[0]), np.arange(size[1]))
    return codec.graph("infer")(pad(x, codec.downsample_factor))
  step = tiling.step_of(list(windows.values()))
  rows, columns = (_padded_index(s, codec.downsample_factor, step) for s in size)
  whole: dict[str, list[Optional[np.ndarray]]] = {}
  at_once = max(1, tiling.PIXELS_AT_ONCE // batch)
  for down, across in tiling.tiles((len(rows), len(columns)), list(windows.values()), at_once):
    x = read(rows[down.source(1)], columns[across.source(1)])
    for name, latent in codec.graph("infer_tile")(x).items():
      scale = windows[name].downsample
      (to_rows, from_rows), (to_columns, from_columns) = down.own(scale), across.own(scale)
      for i, part in enumerate(latent):
        if part is None:
          whole.setdefault(name, []).append(None)
          continue
        part = part.numpy()
        parts = whole.setdefault(name, [])
        if len(parts) <= i:
          shape = [batch, len(rows) // scale, len(columns) // scale, part.shape[3]]
          parts.append(np.empty(shape, np.float32))
        target = parts[i]
        assert target is not None
        target[:, to_rows, to_columns] = part[:, from_rows, from_columns]
  latents = {}
  for name in list(whole):
    # One after the other: an array and its tensor are both in memory for a moment.
    loc, log_scale = [None if a is None else tf.constant(a) for a in whole.pop(name)[:2]]
    latents[name] = Latent(loc, log_scale)
  return codec.complete(latents)


def _padded_index(size: int, factor: int, step: int) -> np.ndarray:
  """Which sample stands at each place, padded as `pad` does, then the edge repeated to `step`."""
  padded = padded_size(size, factor)
  index = np.minimum(np.arange(padded_size(padded, step)), padded - 1)
  reflects = padded - size < size
  return np.where(index < size, index, 2 * (size - 1) - index if reflects else size - 1)


def synthesize(
  codec: TrainableCodec, decode: Mapping[str, tf.Tensor], size: tuple[int, int]
) -> tf.Tensor:
  """Pixels of decoded latents, cropped to `size` (height, width): [B, H, W, 3] float32."""
  parts = list(_synthesized(codec, decode, size))
  if len(parts) == 1:
    return parts[0][2]
  whole = np.empty([parts[0][2].shape[0], *size, 3], np.float32)
  for rows, columns, part in parts:
    whole[:, rows, columns] = part
  return tf.constant(whole)


def reconstruct(
  codec: TrainableCodec, decode: Mapping[str, tf.Tensor], size: tuple[int, int]
) -> np.ndarray:
  """The picture of one image's decoded latents: uint8 [H, W, 3] of `size` (height, width)."""
  image = np.empty([*size, 3], np.uint8)
  for rows, columns, part in _synthesized(codec, decode, size):
    image[rows, columns] = to_image(part)
  return image


def _synthesized(
  codec: TrainableCodec, decode: Mapping[str, tf.Tensor], size: tuple[int, int]
) -> Iterator[tuple[slice, slice, tf.Tensor]]:
  """Parts of the pixels [B, h, w, 3], and where they lie; one part unless the picture is large."""
  windows = codec.synthesis_windows()
  batch = int(next(iter(decode.values())).shape[0])
  if batch * size[0] * size[1] <= tiling.PIXELS_AT_ONCE or windows is None:
    if windows is None:
      tiling.check_whole((batch * size[0], size[1]), f"this {codec.name} codec's decoder")
    whole = codec.graph("synthesize")(dict(decode))[:, : size[0], : size[1]]
    yield slice(0, size[0]), slice(0, size[1]), whole
    return
  step = tiling.step_of(list(windows.values()))
  padded = (padded_size(size[0], step), padded_size(size[1], step))
  at_once = max(1, tiling.PIXELS_AT_ONCE // batch)
  # Latents of a coarser grid's padding have a say in the last rows and columns.
  name, values = next(iter(decode.items()))
  extent = (windows[name].upsample * values.shape[1], windows[name].upsample * values.shape[2])
  for down, across in tiling.tiles(padded, list(windows.values()), at_once, extent):
    part = {}
    for name, values in decode.items():
      scale = windows[name].upsample
      part[name] = values[:, down.source(scale), across.source(scale)]
    x = codec.graph("synthesize")(part)
    (rows, from_rows), (columns, from_columns) = down.own(1), across.own(1)
    rows, columns = (
      slice(rows.start, min(rows.stop, size[0])),
      slice(columns.start, min(columns.stop, size[1])),
    )
    x = x[:, from_rows, from_columns][:, : rows.stop - rows.start, : columns.stop - columns.start]
    yield rows, columns, x


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
