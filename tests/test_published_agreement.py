"""Our measurements of classical codecs on Kodak against published ones, where settings agree.

The published curves are in json_results/published, so only the pictures are needed.
"""

import numpy as np
import pytest
from scipy import fft

from common import classical, data, report_data
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def kodak():
  try:
    return [image for _, image in data.load_eval_images("kodak")]
  except data.DataError as e:
    pytest.skip(f"Kodak is not here: {e}")


@pytest.fixture(scope="module")
def published():
  found = report_data.load_published(ROOT / "json_results" / "published", "kodak")[0]
  return {(s.publication.source, s.publication.codec): s.curve for s in found}


def psnr_at(curve, bpp):
  """Published PSNR at a rate, linear in the rate's logarithm between the neighbouring points."""
  return float(np.interp(np.log(bpp), np.log(curve.bpp), curve.psnr_db))


def psnr(a, b):
  return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def measure(name, quality, pictures, decode=None):
  """Mean bpp and mean PSNR over the pictures; `decode`: from the picture and the file."""
  codec = classical.make(name, quality)
  bpp, quality_db = [], []
  for image in pictures:
    file = codec.compress(image)
    bpp.append(8 * len(file) / (image.shape[0] * image.shape[1]))
    decoded = codec.decompress(file) if decode is None else decode(image, file)
    quality_db.append(psnr(image, decoded))
  return float(np.mean(bpp)), float(np.mean(quality_db))


@pytest.mark.slow
@pytest.mark.parametrize("quality", [5, 20, 50, 80, 95])
def test_webp_equals_compressais(kodak, published, quality):
  curve = published["InterDigitalInc/CompressAI", "webp-compressai"]
  bpp, found = measure("webp", quality, kodak)
  assert found == pytest.approx(psnr_at(curve, bpp), abs=0.01)


def dct_scaled(image, file):
  """What libjpeg 7 to 9 make of a JPEG 4:2:0 file and its picture.

  They take chroma to half its size and back by keeping the 8x8 low frequencies of 16x16 blocks,
  where libjpeg-turbo averages 2x2 pixels and interpolates linearly. Written from the definitions;
  sides must be multiples of 16.
  """
  import io

  from PIL import Image

  tables = Image.open(io.BytesIO(file)).quantization
  luma, chroma = (np.reshape(tables[i], [8, 8]) for i in (0, 1))
  r, g, b = np.moveaxis(image.astype(np.float64), 2, 0)
  y = 0.299 * r + 0.587 * g + 0.114 * b
  cb, cr = 128 + (b - y) / 1.772, 128 + (r - y) / 1.402

  def through(plane, side, table):
    height, width = plane.shape
    blocks = np.rint(plane).reshape(height // side, side, width // side, side) - 128
    scale = side / 8
    low = fft.dctn(blocks, axes=(1, 3), norm="ortho")[:, :8, :, :8] / scale
    whole = np.zeros_like(blocks)
    step = table[None, :, None, :]
    whole[:, :8, :, :8] = np.rint(low / step) * step * scale
    decoded = fft.idctn(whole, axes=(1, 3), norm="ortho").reshape(height, width)
    return np.clip(np.rint(decoded + 128), 0, 255)

  y, cb, cr = through(y, 8, luma), through(cb, 16, chroma), through(cr, 16, chroma)
  r, b = y + 1.402 * (cr - 128), y + 1.772 * (cb - 128)
  g = (y - 0.299 * r - 0.114 * b) / 0.587
  return np.clip(np.rint(np.stack([r, g, b], 2)), 0, 255)


@pytest.mark.slow
@pytest.mark.parametrize("quality", [5, 20, 50, 80, 95])
def test_jpeg_equals_compressais_but_for_the_chroma_of_its_libjpeg(kodak, published, quality):
  """CompressAI's Pillow 7.1.2 came with libjpeg 9, today's with libjpeg-turbo."""
  curve = published["InterDigitalInc/CompressAI", "jpeg-compressai"]
  bpp, ours = measure("jpeg", quality, kodak)
  _, theirs = measure("jpeg", quality, kodak, dct_scaled)
  expected = psnr_at(curve, bpp)
  assert theirs == pytest.approx(expected, abs=0.04)
  assert -0.05 < ours - expected < 0.15


@pytest.mark.slow
def test_jpeg_agrees_with_tensorflow_compressions_without_the_files_headers(kodak, published):
  """Their rates are lower at equal PSNR by about what a header and its tables take: 623 bytes."""
  curve = published["tensorflow/compression", "jpeg420"]
  for quality in (15, 30, 50, 80, 95):
    bpp, found = measure("jpeg", quality, kodak)
    pixels = kodak[0].shape[0] * kodak[0].shape[1]
    assert found == pytest.approx(psnr_at(curve, bpp - 8 * 623 / pixels), abs=0.1), quality


def test_the_header_of_a_small_jpeg_takes_623_bytes():
  file = classical.make("jpeg", 50).compress(np.full([8, 8, 3], 128, np.uint8))
  assert file.index(b"\xff\xda") + 14 == 623  # The scan's marker and its header.
