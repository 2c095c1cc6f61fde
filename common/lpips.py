"""LPIPS, version 0.1 with AlexNet: how different two pictures look (Zhang et al. 2018).

The weights are not part of this project: `python -m common.lpips_weights` makes their file from the
packages `lpips` and `torchvision`. It is an .npz of conv1_kernel .. conv5_kernel (height, width,
in, out), conv1_bias .. conv5_bias and lin0 .. lin4.
"""

import functools
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Optional

import numpy as np
import tensorflow as tf

import configs
from common import metrics
from common.metrics import HOW_LPIPS_WEIGHTS as HOW

# Of the network's input, a picture in -1..1: shift and scale of R, G, B.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

# Kernel size, stride, zeros at each edge, and whether a 3x3 max-pooling of stride 2 comes before.
LAYERS = ((11, 4, 2, False), (5, 1, 2, True), (3, 1, 1, True), (3, 1, 1, False), (3, 1, 1, False))
CHANNELS = (64, 192, 384, 256, 256)

# Both poolings need 3 samples: shorter sides have no LPIPS.
MIN_SIDE = 31

_EPSILON = 1e-10


class LpipsError(RuntimeError):
  """No weights, or a file that does not hold them; the message says how to make them."""


def shapes() -> dict[str, tuple[int, ...]]:
  """Name -> shape of the arrays in a weights file."""
  found: dict[str, tuple[int, ...]] = {}
  previous = 3
  for i, ((size, *_), channels) in enumerate(zip(LAYERS, CHANNELS)):
    found[f"conv{i + 1}_kernel"] = (size, size, previous, channels)
    found[f"conv{i + 1}_bias"] = (channels,)
    found[f"lin{i}"] = (channels,)
    previous = channels
  return found


def check(weights: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
  """The arrays that `shapes` names, float32.

  Raises:
    LpipsError: One is missing, of another shape, not finite, or a linear weight is negative.
  """
  checked = {}
  for name, shape in shapes().items():
    if name not in weights:
      raise LpipsError(f"{where} holds no {name}: it is no file of LPIPS weights. {HOW}")
    array = np.asarray(weights[name], np.float32)
    if array.shape != shape:
      raise LpipsError(f"{name} of {where} has shape {array.shape} instead of {shape}. {HOW}")
    if not np.all(np.isfinite(array)) or (name.startswith("lin") and np.any(array < 0)):
      raise LpipsError(f"{name} of {where} has impossible values. {HOW}")
    checked[name] = array
  return checked


def load() -> dict[str, np.ndarray]:
  """The weights of `metrics.lpips_weights`, read once.

  Raises:
    LpipsError: There are none, or the file is damaged.
  """
  path = metrics.lpips_weights()
  if path is None:
    raise LpipsError(
      f"There are no LPIPS weights at {configs.LPIPS_WEIGHTS}. {HOW} (or set NTC_LPIPS_WEIGHTS)."
    )
  return _read(path)


@functools.lru_cache(maxsize=2)
def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    with np.load(path) as arrays:
      return check(dict(arrays), str(path))
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
    raise LpipsError(f"{path} cannot be read ({e}). {HOW}") from e


def features(x: tf.Tensor, weights: Mapping[str, np.ndarray]) -> list[tf.Tensor]:
  """Outputs of AlexNet's five ReLUs. `x`: [B, H, W, 3] in 0..255, sides of MIN_SIDE or more."""
  x = (x / 127.5 - 1.0 - tf.constant(SHIFT)) / tf.constant(SCALE)
  outputs = []
  for i, (_, stride, zeros, pools) in enumerate(LAYERS):
    if pools:
      x = tf.nn.max_pool2d(x, 3, 2, "VALID")
    x = tf.pad(x, [[0, 0], [zeros, zeros], [zeros, zeros], [0, 0]])
    x = tf.nn.conv2d(x, tf.constant(weights[f"conv{i + 1}_kernel"]), stride, "VALID")
    x = tf.nn.relu(tf.nn.bias_add(x, tf.constant(weights[f"conv{i + 1}_bias"])))
    outputs.append(x)
  return outputs


def distance(a: tf.Tensor, b: tf.Tensor, weights: Mapping[str, np.ndarray]) -> tf.Tensor:
  """LPIPS of pairs of pictures, [B]; 0 for identical ones.

  Args:
    a: [B, H, W, 3] float32 in 0..255, H and W of MIN_SIDE or more.
    b: The same shape.
    weights: From `load`.
  """
  total = tf.zeros([tf.shape(a)[0]])
  for i, (p, q) in enumerate(zip(features(a, weights), features(b, weights))):
    squares = tf.math.squared_difference(_unit(p), _unit(q))
    weighted = tf.tensordot(squares, tf.constant(weights[f"lin{i}"]), 1)
    total += tf.reduce_mean(weighted, axis=[1, 2])
  return total


def _unit(x: tf.Tensor) -> tf.Tensor:
  """Vectors over the channels, of length 1. The square root's gradient at 0 is kept finite."""
  squares = tf.reduce_sum(tf.square(x), axis=-1, keepdims=True)
  length = tf.sqrt(tf.maximum(squares, 1e-20))
  return x / (length + _EPSILON)


def of_images(a: np.ndarray, b: np.ndarray) -> Optional[float]:
  """LPIPS of two uint8 pictures [H, W, 3]; None where a side is under MIN_SIDE pixels.

  Raises:
    LpipsError: There are no weights.
  """
  if min(a.shape[:2]) < MIN_SIDE:
    return None
  weights = load()
  with tf.device("CPU:0"):
    if a.shape[0] * a.shape[1] > PIXELS_AT_ONCE:
      return _distance_in_tiles(a, b, weights)
    x, y = (tf.constant(image[None], tf.float32) for image in (a, b))
    return float(distance(x, y, weights)[0])


# Larger pictures are measured in tiles.
PIXELS_AT_ONCE = 1 << 20
_TILE = 1024  # The side of a tile's own part, a multiple of all strides.
_AROUND = 112  # Pixels around it, a multiple of all strides: the fifth layer sees 80 at most.
_STRIDES = (4, 8, 16, 16, 16)  # Of the layers' outputs, in pixels.


def _distance_in_tiles(a: np.ndarray, b: np.ndarray, weights: Mapping[str, np.ndarray]) -> float:
  """`distance` of uint8 pictures [H, W, 3]: sums over tiles, which overlap by `_AROUND`."""
  height, width = a.shape[:2]
  grids = [_grid(height), _grid(width)]
  totals = np.zeros(len(LAYERS))
  for top in range(0, height, _TILE):
    for left in range(0, width, _TILE):
      begins = [max(0, first - _AROUND) for first in (top, left)]
      ends = [min(size, first + _TILE + _AROUND) for first, size in ((top, height), (left, width))]
      part = tuple(slice(b, e) for b, e in zip(begins, ends))
      x, y = (features(tf.constant(i[part][None], tf.float32), weights) for i in (a, b))
      for i, (p, q) in enumerate(zip(x, y)):
        own = []
        for first, begin, end, size, grid in zip((top, left), begins, ends, (height, width), grids):
          # The last tile has all that is left.
          stop = grid[i] if end == size else (first + _TILE) // _STRIDES[i]
          own.append(slice((first - begin) // _STRIDES[i], stop - begin // _STRIDES[i]))
        squares = tf.math.squared_difference(*(_unit(f[:, own[0], own[1]]) for f in (p, q)))
        weighted = tf.tensordot(squares, tf.constant(weights[f"lin{i}"]), 1)
        totals[i] += float(tf.reduce_sum(weighted))
      if ends[1] == width:
        break
    if ends[0] == height:
      break
  return float(sum(t / (r * c) for t, r, c in zip(totals, *grids)))


def _grid(size: int) -> list[int]:
  """How many positions the layers have along a side."""
  sizes = []
  for kernel, stride, zeros, pools in LAYERS:
    size = (size - 3) // 2 + 1 if pools else size
    size = (size + 2 * zeros - kernel) // stride + 1
    sizes.append(size)
  return sizes
