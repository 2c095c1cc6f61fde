"""Distortion of a decoded picture: MSE, PSNR, MS-SSIM and LPIPS of uint8 images.

Every metric is of one picture; averages over pictures are made from the records (PSNR a picture,
then the mean), never of pooled errors.
"""

import functools
import logging
import math
import pathlib
from typing import Any, Optional

import numpy as np

import configs

_LOG = logging.getLogger(__name__)

# Weights of the scales, finest first: Wang, Simoncelli and Bovik 2003, "Multi-scale structural
# similarity for image quality assessment", section 3.2.
MSSSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

# Side of the Gaussian window (sigma 1.5) that SSIM's local statistics are taken with, in pixels.
MSSSIM_WINDOW = 11
_GAUSSIAN = np.exp(-((np.arange(MSSSIM_WINDOW) - MSSSIM_WINDOW // 2) ** 2) / (2 * 1.5**2))
_GAUSSIAN /= _GAUSSIAN.sum()

# SSIM's constants (0.01 and 0.03 of the peak, squared) keep its fractions finite on flat regions.
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

_STRIP_PIXELS = 8192
_ROWS_PIXELS = 1 << 18


def mse(a: np.ndarray, b: np.ndarray) -> float:
  """Mean squared error over all pixels and channels, on the 0..255 scale.

  Args:
    a: uint8 [H, W, 3].
    b: The same shape and type.

  Returns:
    Exact up to the last rounding: the sum is made of integers.

  Raises:
    ValueError: The shapes differ, an image is empty, or one is not uint8.
  """
  _check(a, b)
  total = 0
  rows = max(1, _ROWS_PIXELS // a.shape[1])
  for top in range(0, a.shape[0], rows):
    difference = a[top : top + rows].astype(np.int32) - b[top : top + rows]
    total += int(np.sum(difference * difference, dtype=np.int64))
  return total / a.size


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
  """Peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE); `math.inf` for identical images.

  The MSE is over the three RGB channels together. Arguments as for `mse`.
  """
  return psnr_of_mse(mse(a, b))


def psnr_of_mse(error: float) -> float:
  """10 log10(255^2 / error) in dB; `math.inf` for an error of 0."""
  return 10 * math.log10(255**2 / error) if error else math.inf


def num_msssim_scales(height: int, width: int) -> int:
  """How many scales (0 to 5) the window fits into: each halves the sides, rounding up.

  5 from 161 pixels on the shorter side, 4 from 81, 3 from 41, 2 from 21, 1 from 11, else 0.
  """
  side, scales = min(height, width), 0
  while scales < len(MSSSIM_WEIGHTS) and side >= MSSSIM_WINDOW:
    scales += 1
    side = (side + 1) // 2
  return scales


def msssim(a: np.ndarray, b: np.ndarray) -> tuple[Optional[float], int]:
  """Multi-scale structural similarity, Wang et al. 2003, the mean over the R, G and B channels.

  The same definition as `tf.image.ssim_multiscale`, in float64. That function averages in float32
  one pixel after the other, and loses digits with the size of the picture: on a photograph of
  2048x1507 pixels as JPEG it gives 19.3 dB in place of 18.9 at quality 50, 32.1 in place of 26.5
  at quality 95 (on 768x512: up to 0.3 dB there).

  Args:
    a: uint8 [H, W, 3].
    b: The same shape and type.

  Returns:
    The value in 0..1 (a negative similarity counts as 0), and the number of scales. Where the
    shorter side is under 161 pixels there are fewer scales and their weights are made to sum to 1
    again, so the value is not comparable with one of five scales; with a side under 11 pixels the
    window does not fit once and the result is (None, 0).

  Raises:
    ValueError: The shapes differ, an image is empty, or one is not uint8.
  """
  _check(a, b)
  scales = num_msssim_scales(a.shape[0], a.shape[1])
  if scales == 0:
    return None, 0
  weights = np.array(MSSSIM_WEIGHTS[:scales])
  if scales < len(MSSSIM_WEIGHTS):
    weights /= weights.sum()  # All five are used as published, though they sum to 1.0001.
  # Whole numbers, 4^scale times the values: exact, and a quarter of the memory of float64.
  x, y = a, b
  value = np.ones(3)
  for scale in range(scales):
    if scale:
      x, y = _halve(x), _halve(y)
    contrast, similarity = _ssim(x, y, 0.25**scale)
    # The luminance term counts at the coarsest scale only.
    factor = similarity if scale == scales - 1 else contrast
    value *= np.maximum(factor, 0) ** weights[scale]
  return min(max(float(value.mean()), 0.0), 1.0), scales


def _halve(x: np.ndarray) -> np.ndarray:
  """Sums of 2x2 pixels, [H, W, 3] -> uint16 [ceil(H/2), ceil(W/2), 3]; an odd last line counts
  twice. Four times are within uint16: 255 * 4^4."""
  height, width = x.shape[:2]
  if height % 2 or width % 2:
    x = np.pad(x, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
  out = x[::2, ::2].astype(np.uint16)
  for part in (x[1::2, ::2], x[::2, 1::2], x[1::2, 1::2]):
    out += part
  return out


def _ssim(x: np.ndarray, y: np.ndarray, unit: float) -> tuple[np.ndarray, np.ndarray]:
  """Mean contrast-structure term and mean SSIM, each [3], of images [H, W, 3] in units of 0..255.

  In strips of rows that fit the processor's cache: two to three times as fast on large pictures,
  and little memory is in use.
  """
  height, width = x.shape[0] - MSSSIM_WINDOW + 1, x.shape[1] - MSSSIM_WINDOW + 1
  rows = max(1, _STRIP_PIXELS // x.shape[1])
  contrast_sum, similarity_sum = np.zeros(3), np.zeros(3)
  for top in range(0, height, rows):
    bottom = min(top + rows, height) + MSSSIM_WINDOW - 1
    p, q = x[top:bottom] * unit, y[top:bottom] * unit
    mean_p, mean_q = _blur(p), _blur(q)
    mean_pq, mean_squares = mean_p * mean_q, mean_p * mean_p + mean_q * mean_q
    covariance = _blur(p * q) - mean_pq
    variances = _blur(p * p + q * q) - mean_squares
    contrast = (2 * covariance + _C2) / (variances + _C2)
    contrast_sum += contrast.sum(axis=(0, 1))
    similarity_sum += (contrast * (2 * mean_pq + _C1) / (mean_squares + _C1)).sum(axis=(0, 1))
  return contrast_sum / (height * width), similarity_sum / (height * width)


def _blur(x: np.ndarray) -> np.ndarray:
  """Gaussian-weighted means of all whole windows: [H, W, 3] -> [H - 10, W - 10, 3]."""
  last = MSSSIM_WINDOW - 1
  for axis in (0, 1):
    size = x.shape[axis] - last

    def shifted(k: int, x: np.ndarray = x, axis: int = axis, size: int = size) -> np.ndarray:
      return x[k : k + size] if axis == 0 else x[:, k : k + size]

    total = _GAUSSIAN[last // 2] * shifted(last // 2)
    for k in range(last // 2):
      total += _GAUSSIAN[k] * (shifted(k) + shifted(last - k))
    x = total
  return x


def lpips(a: np.ndarray, b: np.ndarray) -> Optional[float]:
  """LPIPS (AlexNet, version 0.1) of two uint8 images [H, W, 3]; lower is better, 0 is identical.

  None where a side is under 31 pixels, and where there are no weights: the log says so once, and
  how to make them. Needs TensorFlow; about a third of a second for 768x512 on two cores.

  Raises:
    ValueError: The shapes differ, an image is empty, or one is not uint8.
    common.lpips.LpipsError: The weights file is damaged.
  """
  _check(a, b)
  if lpips_weights() is None:
    _warn_that_lpips_is_left_out()
    return None
  from common import lpips as network  # Lazy: it imports TensorFlow.

  return network.of_images(a, b)


HOW_LPIPS_WEIGHTS = "Make the file with: python -m common.lpips_weights"


def lpips_weights() -> Optional[pathlib.Path]:
  """The weights file, or None: `configs.LPIPS_WEIGHTS`, else that in `configs.SHARED_DIR`."""
  shared = configs.SHARED_DIR / "weights" / "lpips_alex_v0.1.npz"
  given = (configs.LPIPS_WEIGHTS, *(() if configs.LPIPS_WEIGHTS_IS_SET else (shared,)))
  return next((path for path in given if path.is_file()), None)


@functools.lru_cache(maxsize=1)
def _warn_that_lpips_is_left_out() -> None:
  _LOG.warning("LPIPS is left out of the records: there are no weights. %s", HOW_LPIPS_WEIGHTS)


def measure(original: np.ndarray, decoded: np.ndarray, with_lpips: bool = True) -> dict[str, Any]:
  """The distortion fields of a `results.EvalRecord`.

  Args:
    original: uint8 [H, W, 3].
    decoded: The same shape and type.
    with_lpips: Whether `lpips` is computed, where there are weights.

  Returns:
    psnr_db (None where it is infinite), msssim, msssim_scales, lpips (None where it was not
    computed) and mse.
  """
  error = mse(original, decoded)
  similarity, scales = msssim(original, decoded)
  return {
    "psnr_db": psnr_of_mse(error) if error else None,
    "msssim": similarity,
    "msssim_scales": scales,
    "lpips": lpips(original, decoded) if with_lpips else None,
    "mse": error,
  }


def _check(a: np.ndarray, b: np.ndarray) -> None:
  if a.dtype != np.uint8 or b.dtype != np.uint8:
    raise ValueError(f"Metrics are of uint8 images; got {a.dtype} and {b.dtype}.")
  if a.ndim != 3 or a.shape[2] != 3:
    raise ValueError(f"Metrics are of images [H, W, 3]; got {a.shape}.")
  if a.shape != b.shape:
    raise ValueError(f"The images differ in shape: {a.shape} and {b.shape}.")
  if not a.size:
    raise ValueError("The images are empty.")
