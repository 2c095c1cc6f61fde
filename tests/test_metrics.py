import io
import math

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from common import metrics


def photograph(height, width, seed=0):
  """Smooth and textured regions, uint8 [H, W, 3]."""
  rng = np.random.default_rng(seed)
  noise = rng.normal(size=[height, width, 3])
  smooth = ndimage.gaussian_filter(noise, (6, 6, 0.5)) * 900
  fine = ndimage.gaussian_filter(noise, (1, 1, 0)) * 60 * (np.arange(width) > width / 2)[:, None]
  return np.clip(110 + smooth + fine, 0, 255).astype(np.uint8)


def as_jpeg(image, quality):
  file = io.BytesIO()
  Image.fromarray(image).save(file, "JPEG", quality=quality)
  return np.array(Image.open(file))


def golden_msssim(a, b, weights):
  """MS-SSIM by scipy, written from the paper: float64, whole images, one channel after another."""
  g = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
  window = np.outer(g, g) / g.sum() ** 2

  def blur(x):
    return ndimage.correlate(x, window, mode="constant")[5:-5, 5:-5]

  def halve(x):
    x = np.pad(x, [(0, n % 2) for n in x.shape], mode="symmetric")
    return ndimage.uniform_filter(x, 2, origin=-1)[::2, ::2]

  c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
  channels = []
  for channel in range(3):
    x, y = a[..., channel].astype(float), b[..., channel].astype(float)
    product = 1.0
    for scale, weight in enumerate(weights):
      if scale:
        x, y = halve(x), halve(y)
      mx, my = blur(x), blur(y)
      vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
      term = (2 * cov + c2) / (vx + vy + c2)
      if scale == len(weights) - 1:
        term = term * (2 * mx * my + c1) / (mx**2 + my**2 + c1)
      product *= max(term.mean(), 0) ** weight
    channels.append(product)
  return np.mean(channels)


def test_mse_and_psnr_agree_with_floating_point():
  a = photograph(37, 53)
  b = as_jpeg(a, 40)
  expected = np.mean((a.astype(float) - b.astype(float)) ** 2)
  assert metrics.mse(a, b) == pytest.approx(expected, rel=1e-12)
  assert metrics.psnr_db(a, b) == pytest.approx(20 * math.log10(255 / math.sqrt(expected)))


def test_extreme_differences_do_not_overflow():
  a = np.zeros([64, 64, 3], np.uint8)
  assert metrics.mse(a, a + np.uint8(255)) == 255**2
  assert metrics.psnr_db(a, a + np.uint8(255)) == 0


def test_identical_images_have_infinite_psnr():
  a = photograph(20, 30)
  assert metrics.psnr_db(a, a) == math.inf


@pytest.mark.parametrize("size", [(176, 161), (163, 203)])
@pytest.mark.parametrize("quality", [5, 60, 98])
def test_msssim_agrees_with_a_plain_implementation(size, quality):
  a = photograph(*size)
  b = as_jpeg(a, quality)
  value, scales = metrics.msssim(a, b)
  assert scales == 5
  assert value == pytest.approx(golden_msssim(a, b, metrics.MSSSIM_WEIGHTS), abs=1e-12)


def test_msssim_agrees_with_tensorflow_on_a_small_picture():
  import tensorflow as tf

  a = photograph(176, 192)
  b = as_jpeg(a, 20)
  expected = float(tf.image.ssim_multiscale(a[None], b[None], 255)[0])
  assert metrics.msssim(a, b)[0] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("side, scales", [(161, 5), (160, 4), (81, 4), (80, 3), (41, 3), (40, 2),
                                          (21, 2), (20, 1), (11, 1), (10, 0), (1, 0)])  # fmt: skip
def test_small_pictures_have_fewer_scales(side, scales):
  assert metrics.num_msssim_scales(side, 400) == metrics.num_msssim_scales(400, side) == scales
  a = photograph(side, 200)
  value, used = metrics.msssim(a, a)
  assert used == scales
  assert value == (None if scales == 0 else 1.0)


def test_weights_of_fewer_scales_sum_to_one():
  a = photograph(50, 90)
  b = as_jpeg(a, 10)
  weights = np.array(metrics.MSSSIM_WEIGHTS[:3])
  value, scales = metrics.msssim(a, b)
  assert scales == 3
  assert value == pytest.approx(golden_msssim(a, b, weights / weights.sum()), abs=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_strips_do_not_change_msssim(monkeypatch, rows):
  a = photograph(170, 180)
  b = as_jpeg(a, 30)
  expected = metrics.msssim(a, b)[0]
  monkeypatch.setattr(metrics, "_STRIP_PIXELS", rows * 180)
  assert metrics.msssim(a, b)[0] == pytest.approx(expected, abs=1e-12)


def test_opposite_images_have_msssim_0():
  a = np.random.default_rng(0).integers(0, 256, [180, 180, 3]).astype(np.uint8)
  assert metrics.msssim(a, 255 - a) == (0.0, 5)


def test_flat_images_have_finite_msssim():
  black, white = np.zeros([170, 170, 3], np.uint8), np.full([170, 170, 3], 255, np.uint8)
  assert metrics.msssim(black, black) == (1.0, 5)
  assert 0 < metrics.msssim(black, white)[0] < 0.5


def test_measure_fills_the_fields_of_a_record():
  a = photograph(30, 200)
  b = as_jpeg(a, 50)
  measured = metrics.measure(a, b, with_lpips=False)
  assert measured == {
    "psnr_db": metrics.psnr_db(a, b),
    "msssim": metrics.msssim(a, b)[0],
    "msssim_scales": 2,
    "lpips": None,
    "mse": metrics.mse(a, b),
  }
  assert metrics.measure(a, a)["psnr_db"] is None
  assert metrics.measure(a[:5], b[:5])["msssim"] is None


@pytest.mark.parametrize(
  "a, b, words",
  [
    (np.zeros([4, 4, 3]), np.zeros([4, 4, 3]), "uint8"),
    (np.zeros([4, 4, 3], np.uint8), np.zeros([4, 5, 3], np.uint8), "differ in shape"),
    (np.zeros([4, 4], np.uint8), np.zeros([4, 4], np.uint8), r"\[H, W, 3\]"),
    (np.zeros([0, 4, 3], np.uint8), np.zeros([0, 4, 3], np.uint8), "empty"),
  ],
)
def test_other_arrays_are_refused(a, b, words):
  with pytest.raises(ValueError, match=words):
    metrics.mse(a, b)
  with pytest.raises(ValueError, match=words):
    metrics.msssim(a, b)
