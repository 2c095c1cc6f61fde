"""Pixels to DCT coefficients as every JPEG decoder inverts them, in numpy and in floating point.

RGB -> JFIF YCbCr (full range) - 128 -> chroma averaged over 2x2 pixels for 4:2:0 -> edges repeated
to whole blocks -> orthonormal 8x8 DCT. Nothing is rounded: encoders that round YCbCr to whole
numbers first lose a little.
"""

import numpy as np

from ljpeg import jpeg_file

# JFIF's conversion (ITU-T T.871), rows Y, Cb, Cr; Cb and Cr get 128 added, which the level shift of
# JPEG takes off again.
TO_YCBCR = np.array(
  [
    [0.299, 0.587, 0.114],
    [-0.299 / 1.772, -0.587 / 1.772, 0.886 / 1.772],
    [0.701 / 1.402, -0.587 / 1.402, -0.114 / 1.402],
  ]
)
TO_RGB = np.linalg.inv(TO_YCBCR)

# An error e of (Y, Cb, Cr) is a squared error e GRAM e in RGB, summed over the three channels.
GRAM = TO_RGB.T @ TO_RGB

# DCT[k, n]: orthonormal DCT-II of 8 samples, frequency k.
DCT = np.sqrt(2 / 8) * np.cos(np.pi * (np.arange(8) + 0.5) * np.arange(8)[:, np.newaxis] / 8)
DCT[0] /= np.sqrt(2)


def planes(image: np.ndarray, subsampling: str = "4:4:4") -> list[np.ndarray]:
  """Y, Cb and Cr of a picture, less 128, with edges repeated to whole blocks.

  Args:
    image: uint8 [H, W, 3] RGB, or [H, W] grey.
    subsampling: Of the chroma planes.

  Returns:
    float32 [8 rows, 8 cols] each, see `jpeg_file.grid`; of a grey picture one plane.
  """
  size = (image.shape[0], image.shape[1])
  if image.ndim == 2:
    found = [image.astype(np.float32) - 128]
  else:
    flat = image.reshape(-1, 3).astype(np.float32)
    matrix = TO_YCBCR.astype(np.float32)
    found = [(flat @ row).reshape(size) for row in matrix]
    found[0] -= 128
  for i, plane in enumerate(found):
    if i and subsampling == "4:2:0":
      plane = _even(plane)
      plane = (plane[::2, ::2] + plane[1::2, ::2] + plane[::2, 1::2] + plane[1::2, 1::2]) / 4
    rows, cols = jpeg_file.grid(size, subsampling, i)
    found[i] = _padded(plane, 8 * rows, 8 * cols)
  return found


def _even(plane: np.ndarray) -> np.ndarray:
  return _padded(plane, plane.shape[0] + plane.shape[0] % 2, plane.shape[1] + plane.shape[1] % 2)


def _padded(plane: np.ndarray, height: int, width: int) -> np.ndarray:
  """The plane with its last row and column repeated."""
  more = ((0, height - plane.shape[0]), (0, width - plane.shape[1]))
  return np.pad(plane, more, "edge") if more[0][1] or more[1][1] else plane


def dct(plane: np.ndarray) -> np.ndarray:
  """Blocks' coefficients of a plane [8 rows, 8 cols]: float32 [rows, cols, 8, 8]."""
  rows, cols = plane.shape[0] // 8, plane.shape[1] // 8
  basis = DCT.astype(plane.dtype)
  vertical = basis @ plane.reshape(rows, 8, 8 * cols)  # [rows, 8, 8 cols]
  both = (vertical.reshape(-1, 8) @ basis.T).reshape(rows, 8, cols, 8)
  return np.ascontiguousarray(both.transpose(0, 2, 1, 3))


def idct(blocks: np.ndarray) -> np.ndarray:
  """The inverse of `dct`: [rows, cols, 8, 8] -> [8 rows, 8 cols]."""
  rows, cols = blocks.shape[:2]
  basis = DCT.astype(blocks.dtype)
  horizontal = (blocks.reshape(-1, 8) @ basis).reshape(rows, cols, 8, 8)
  vertical = basis.T @ horizontal.transpose(0, 2, 1, 3).reshape(rows, 8, 8 * cols)
  return vertical.reshape(8 * rows, 8 * cols)


def coefficients(image: np.ndarray, subsampling: str = "4:4:4") -> list[np.ndarray]:
  """DCT coefficients of a picture's components before quantization.

  Args:
    image: uint8 [H, W, 3] RGB, or [H, W] grey.
    subsampling: "4:4:4" or "4:2:0".

  Returns:
    float32 [rows, cols, 8, 8] each (orthonormal DCT: DC is 8 times the mean), natural order.
  """
  return [dct(plane) for plane in planes(image, subsampling)]


def quantize(coefficients: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Divides [rows, cols, 8, 8] by a table [8, 8] and rounds: int16, within baseline's range."""
  rounded = np.rint(coefficients / np.asarray(table, np.float32))
  return np.clip(rounded, -1023, 1023).astype(np.int16)
