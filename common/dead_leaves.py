"""Generated training pictures: coloured, textured dead leaves with the statistics of photographs.

A picture is a pile of opaque shapes whose radii follow a 1/r^3 law, which makes it scale-invariant
as photographs are (Lee, Mumford and Huang 2001). Each leaf has a colour of the picture's palette, a
shading gradient and, often, a 1/f texture; the whole gets uneven light, a depth of field and a
little noise. The strengths were fitted to the variances of 8x8 DCT coefficients, per frequency
band, of luma and chroma of photographs.
"""

import concurrent.futures
import io
import math
import os
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from common import runs

# Part of the folder's name in the cache: raise it with every change of the pictures.
VERSION = 1

SIZE = 512  # Height and width of a picture, in pixels.
NUM_PICTURES = 64

_SEED = 20170427
_SCALE = 2  # Drawn this many times larger, then averaged, so that edges are smooth.
_BANK_SIZE = 24  # Textures to choose from, shared by all pictures.
_VERTICES = 24


def file_names() -> list[str]:
  """The names of the pictures that `write_pictures` makes."""
  return [f"leaves{index:03d}.png" for index in range(NUM_PICTURES)]


def write_pictures(folder: pathlib.Path) -> None:
  """Writes all pictures as PNG, with a progress bar on a terminal. About 0.15 CPU seconds each."""
  generator = Generator()

  def write(index: int, name: str) -> None:
    encoded = io.BytesIO()
    Image.fromarray(generator.picture(index)).save(encoded, "PNG", compress_level=3)
    runs.atomic_write(folder / name, encoded.getvalue())

  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    jobs = [pool.submit(write, index, name) for index, name in enumerate(file_names())]
    finished = concurrent.futures.as_completed(jobs)
    try:
      for job in tqdm(finished, "Training pictures", len(jobs), unit="picture", disable=None):
        job.result()
    except BaseException:
      for job in jobs:
        job.cancel()
      raise


class Generator:
  """Makes the pictures of one seed; picture `index` does not depend on the others."""

  def __init__(self, seed: int = _SEED):
    self._seed = seed
    self._bank = _texture_bank(np.random.default_rng([seed, VERSION, 1]), SIZE)

  def picture(self, index: int) -> np.ndarray:
    """Picture `index` as uint8 [SIZE,SIZE,3]."""
    rng = np.random.default_rng([self._seed, VERSION, 2, index])
    leaves = _throw_leaves(rng)
    labels = _draw_leaves(rng, leaves)
    picture = _average(self._paint(rng, leaves, labels))
    picture = _depth_of_field(rng, picture)
    grey_noise = rng.standard_normal((*picture.shape[:2], 1), np.float32)
    color_noise = rng.standard_normal(picture.shape, np.float32)
    strength = math.exp(rng.normal(math.log(0.55), 0.6))
    picture += np.float32(strength) * (grey_noise + np.float32(0.3) * color_noise)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)

  def _paint(self, rng: np.random.Generator, leaves: "_Leaves", labels: np.ndarray) -> np.ndarray:
    """Colour, texture and shading of each pixel, float32 [SCALE*SIZE,SCALE*SIZE,3]."""
    count, side = len(leaves.radius), labels.shape[0]
    color = _leaf_colors(rng, leaves)
    # Contrast of the texture and of the shading, relative to the colour.
    strength = np.exp(rng.normal(rng.normal(math.log(0.1), 0.5), 1.0, count))
    strength = np.minimum(strength, 0.5).astype(np.float32)
    choice = rng.integers(_BANK_SIZE, size=6)[rng.integers(6, size=count)]
    offset = rng.integers(self._bank.shape[1], size=(2, count))
    slope = rng.normal(0, 0.12, (2, count)) / np.maximum(leaves.radius, 8 * _SCALE)
    slope = slope.astype(np.float32)
    level = (1 - (slope * leaves.center).sum(0)).astype(np.float32)

    index = np.arange(side)
    position = index.astype(np.float32)
    last = self._bank.shape[1] - 1
    y = (index[:, None] + offset[0][labels]) & last
    x = (index[None, :] + offset[1][labels]) & last
    light = self._bank[choice[labels], y, x]
    light *= strength[labels]
    light += level[labels]
    light += slope[0][labels] * position[:, None]
    light += slope[1][labels] * position[None, :]
    light *= _uneven_light(rng, side)
    return color[labels] * np.maximum(light, 0)[..., None]


class _Leaves(NamedTuple):
  """Leaves in drawing order: the first covers all, the last is on top. Units: drawn pixels."""

  radius: np.ndarray  # [N]
  center: np.ndarray  # [2,N], row and column; some lie outside.


def _throw_leaves(rng: np.random.Generator) -> _Leaves:
  side = SIZE * _SCALE
  low = _SCALE * math.exp(rng.uniform(math.log(1.5), math.log(14)))
  high = side * rng.uniform(0.2, 0.5)
  u = rng.random(20000)
  radii = (low**-2 - u * (low**-2 - high**-2)) ** -0.5
  covered = np.cumsum(math.pi * 0.6 * radii**2) / side**2
  radii = radii[: int(np.searchsorted(covered, 4.0)) + 1]
  # Large things in front, so that detail comes in places, not everywhere.
  front = side * np.exp(rng.uniform(math.log(0.04), math.log(0.35), rng.integers(2, 12)))
  radius = np.concatenate([[side], radii, front])
  return _Leaves(radius, rng.uniform(-0.1 * side, 1.1 * side, (2, len(radius))))


def _draw_leaves(rng: np.random.Generator, leaves: _Leaves) -> np.ndarray:
  """The index of the leaf that is seen at each pixel, int32 [SCALE*SIZE,SCALE*SIZE]."""
  side = SIZE * _SCALE
  count = len(leaves.radius)
  angle = np.linspace(0, 2 * math.pi, _VERTICES, endpoint=False)
  wobble = np.zeros((count, _VERTICES))
  for harmonic in (2, 3, 4, 5):
    size = 0.25 * np.abs(rng.normal(size=count)) / harmonic * (rng.random(count) < 0.6)
    phase = rng.uniform(0, 2 * math.pi, count)
    wobble += size[:, None] * np.cos(harmonic * angle + phase[:, None])
  outline = np.maximum(1 + wobble, 0.2)
  # A third has straight edges: the outline of a polygon of 3 to 6 corners.
  corners = rng.integers(3, 7, count)[:, None]
  half = math.pi / corners
  polygon = np.cos(half) / np.cos(np.mod(angle, 2 * half) - half)
  outline = np.where(rng.random((count, 1)) < 0.35, polygon, outline)
  # Stretched and turned; a few are thin as twigs.
  stretch = np.exp(np.abs(rng.normal(0, 0.45, count)))
  stretch = np.where(rng.random(count) < 0.06, rng.uniform(4, 12, count), stretch)[:, None]
  px = outline * np.cos(angle) * np.sqrt(stretch) * leaves.radius[:, None]
  py = outline * np.sin(angle) / np.sqrt(stretch) * leaves.radius[:, None]
  turn = rng.uniform(0, 2 * math.pi, (count, 1))
  y = leaves.center[0][:, None] + px * np.sin(turn) + py * np.cos(turn)
  x = leaves.center[1][:, None] + px * np.cos(turn) - py * np.sin(turn)
  vertices = np.stack([x, y], -1).reshape(count, -1)
  canvas = Image.new("I", (side, side), 0)
  draw = ImageDraw.Draw(canvas)
  for label in range(1, count):
    draw.polygon(vertices[label].tolist(), fill=label)
  return np.asarray(canvas)


def _leaf_colors(rng: np.random.Generator, leaves: _Leaves) -> np.ndarray:
  """RGB of each leaf, float32 [N,3]: near one of the picture's few colours.

  Each colour has a place in the picture, and leaves take the colour of a place nearby.
  """
  count = len(leaves.radius)
  num_colors = int(rng.integers(4, 10))
  luma_mean = float(np.clip(rng.normal(115, 32), 55, 195))
  luma_std = math.exp(rng.normal(math.log(58), 0.25))
  vivid = math.exp(rng.normal(math.log(13), 0.45))
  tint = rng.normal(0, 9, 2)
  luma = rng.normal(luma_mean, luma_std, num_colors)
  warm = rng.normal(0, 1, num_colors)
  cb = tint[0] + vivid * (-0.8 * warm + 0.6 * rng.normal(0, 1, num_colors))
  cr = tint[1] + vivid * (0.8 * warm + 0.6 * rng.normal(0, 1, num_colors))
  place = rng.uniform(0, SIZE * _SCALE, (2, num_colors))
  away = np.hypot(*(leaves.center[:, :, None] - place[:, None, :]))
  pick = np.argmin(away * np.exp(rng.normal(0, 0.5, away.shape)), 1)
  y = np.clip(luma[pick] + rng.normal(0, 0.22 * luma_std, count), 6, 246)
  cb = cb[pick] + rng.normal(0, 0.2 * vivid, count)
  cr = cr[pick] + rng.normal(0, 0.2 * vivid, count)
  # Dark and bright things have less colour.
  room = np.minimum(1, np.minimum(y, 255 - y) / 70 + 0.15)
  cb, cr = cb * room, cr * room
  rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1)
  return np.clip(rgb, 0, 255).astype(np.float32)


def _uneven_light(rng: np.random.Generator, side: int) -> np.ndarray:
  """Slowly varying brightness around 1, float32 [side,side]."""
  small = Image.fromarray(rng.normal(1, 0.16, (4, 4)).astype(np.float32))
  return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def _texture_bank(rng: np.random.Generator, side: int) -> np.ndarray:
  """Periodic textures, mean 0 and variance 1, float32 [BANK_SIZE,side,side]; side a power of 2."""
  fy = np.fft.fftfreq(side)[:, None]
  fx = np.fft.rfftfreq(side)[None, :]
  bank = np.empty((_BANK_SIZE, side, side), np.float32)
  for i in range(_BANK_SIZE):
    turn = rng.uniform(0, math.pi)
    stretch = math.exp(abs(rng.normal(0, 0.8)))
    u = (fx * math.cos(turn) + fy * math.sin(turn)) * stretch
    v = (-fx * math.sin(turn) + fy * math.cos(turn)) / stretch
    radius = np.sqrt(u * u + v * v)
    lowest = 1 / rng.uniform(16, 160)
    exponent = rng.uniform(0.6, 1.5)
    spectrum = (radius**2 + lowest**2) ** (-exponent / 2)
    spectrum[0, 0] = 0
    noise = np.fft.rfft2(rng.standard_normal((side, side)))
    field = np.fft.irfft2(noise * spectrum, s=(side, side))
    field /= field.std()
    if i % 3 == 1:  # Ridges and cracks.
      field = -np.abs(field)
    elif i % 3 == 2:  # Patches.
      field = np.tanh(3 * field) + 0.4 * field
    bank[i] = (field - field.mean()) / field.std()
  return bank


def _average(picture: np.ndarray) -> np.ndarray:
  """Means of SCALE x SCALE pixels."""
  parts = [picture[i::_SCALE, j::_SCALE] for i in range(_SCALE) for j in range(_SCALE)]
  total = sum(parts[1:], parts[0])
  return total * np.float32(1 / len(parts))


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
  """Gaussian blur along both image axes, edges repeated."""
  reach = max(1, math.ceil(3 * sigma))
  kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
  kernel /= kernel.sum()
  for axis in (0, 1):
    pad = [(0, 0)] * 3
    pad[axis] = (reach, reach)
    padded = np.pad(picture, pad, mode="edge")
    length = picture.shape[axis]
    result = np.zeros_like(picture)
    for k, weight in enumerate(kernel):
      result += weight * np.take(padded, range(k, k + length), axis)
    picture = result
  return picture


def _depth_of_field(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
  """Softens the picture a little everywhere and, in most pictures, more in places."""
  picture = _blur(picture, rng.uniform(0.35, 0.65))
  if rng.random() < 0.5:
    soft = _blur(picture, math.exp(rng.uniform(math.log(1.0), math.log(4.0))))
    field = (_uneven_light(rng, picture.shape[0]) - 1) / 0.16
    weight = np.clip(0.5 + 1.5 * (field + rng.normal(0, 0.5)), 0, 1)[..., None]
    picture = picture + weight * (soft - picture)
  return picture
