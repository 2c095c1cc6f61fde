"""Quantization tables, and the path of quality along which an encoder goes.

A point of a path is a pair of tables with the lambda that belongs to it: how much squared error a
bit is worth when coefficients are chosen (`rdo.optimise`). `tuned` is the path of this package;
trained tables come from a JSON file (`load`).
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from common import runs

# ITU-T T.81, tables K.1 and K.2: luma and chroma, natural order. Encoders call them quality 50.
STANDARD = (
  np.array(
    [
      [16, 11, 10, 16, 24, 40, 51, 61],
      [12, 12, 14, 19, 26, 58, 60, 55],
      [14, 13, 16, 24, 40, 57, 69, 56],
      [14, 17, 22, 29, 51, 87, 80, 62],
      [18, 22, 37, 56, 68, 109, 103, 77],
      [24, 35, 55, 64, 81, 104, 113, 92],
      [49, 64, 78, 87, 103, 121, 120, 101],
      [72, 92, 95, 98, 112, 100, 103, 99],
    ]
  ),
  np.array(
    [
      [17, 18, 24, 47, 99, 99, 99, 99],
      [18, 21, 26, 66, 99, 99, 99, 99],
      [24, 26, 56, 99, 99, 99, 99, 99],
      [47, 66, 99, 99, 99, 99, 99, 99],
      [99, 99, 99, 99, 99, 99, 99, 99],
      [99, 99, 99, 99, 99, 99, 99, 99],
      [99, 99, 99, 99, 99, 99, 99, 99],
      [99, 99, 99, 99, 99, 99, 99, 99],
    ]
  ),
)

FORMAT = "ljpeg tables 1"

# What a level stands for: lambda is this times its square. A flat table of the level is about the
# best flat table for that lambda.
LAMBDA_RATIO = 0.45


class TablesError(ValueError):
  """Tables are missing, damaged or out of range; the message says where."""


@dataclasses.dataclass(frozen=True)
class Point:
  """Tables and the lambda that belongs to them.

  Attributes:
    luma: int64 [8, 8] in 1..255, natural order.
    chroma: The same, for Cb and Cr.
    lambda_: Squared error of RGB that a bit is worth, see `rdo.optimise`.
  """

  luma: np.ndarray
  chroma: np.ndarray
  lambda_: float

  @property
  def tables(self) -> tuple[np.ndarray, np.ndarray]:
    """Luma and chroma, as `jpeg_file.write_jpeg` wants them."""
    return self.luma, self.chroma


def whole(table: np.ndarray) -> np.ndarray:
  """A table of real numbers as baseline JPEG can hold it: rounded, 1..255."""
  return np.clip(np.rint(table), 1, 255).astype(np.int64)


def standard(quality: int) -> tuple[np.ndarray, np.ndarray]:
  """libjpeg's tables of a quality from 1 to 100."""
  if not 1 <= quality <= 100:
    raise TablesError(f"A quality is from 1 to 100, not {quality}.")
  scale = 5000 // quality if quality < 50 else 200 - 2 * quality
  luma, chroma = (np.clip((t * scale + 50) // 100, 1, 255) for t in STANDARD)
  return luma, chroma


def flat(level: float) -> Point:
  """The same step at every frequency; nearly the best by squared error of Y, Cb and Cr."""
  table = whole(np.full((8, 8), level))
  return Point(table, table, LAMBDA_RATIO * float(level) ** 2)


# By subsampling: the level; of luma, then of chroma: size of the steps over the level, slope and
# curvature over the frequency (u + v) / 14, factor of DC. Found for the lambdas of these levels by
# coordinate search for the least error + lambda * bits on 48 crops of 128x128 from cid22-train. In
# between, interpolated over the level's logarithm.
_TUNED = {
  "4:2:0": (
    (8, 1.15, 0.0, -0.2, 1.0, 0.85, 0.25, 0.06, 0.7),
    (18, 1.21, -0.15, -0.1, 1.075, 0.7375, 0.56, 0.06, 0.85),
    (50, 1.12, 0.2, -0.4, 0.925, 0.625, 0.875, 0.0, 0.89),
    (90, 1.24, -0.15, 0.4, 0.81, 0.5875, 1.375, 0.375, 1.0),
  ),
  "4:4:4": (
    (8, 1.12, 0.0, -0.2, 1.15, 1.3, 0.0, 0.0, 0.85),
    (18, 1.21, -0.15, -0.1, 1.075, 1.375, -0.25, 0.31, 0.775),
    (50, 1.12, 0.25, -0.35, 0.925, 1.0, 2.125, -0.25, 0.89),
  ),
}
MIN_LEVEL, MAX_LEVEL = 0.8, 250.0


def tuned(level: float, subsampling: str = "4:2:0") -> Point:
  """Tables for the least squared error in RGB, at a level of coarseness.

  Args:
    level: About the steps of luma; 1 is next to lossless, 250 the coarsest that JPEG can do.
    subsampling: "4:4:4" or "4:2:0".
  """
  if not MIN_LEVEL <= level <= MAX_LEVEL:
    raise TablesError(f"A level is from {MIN_LEVEL} to {MAX_LEVEL}, not {level}.")
  if subsampling not in _TUNED:
    raise TablesError(f"Unknown subsampling {subsampling!r}. Known: {', '.join(_TUNED)}.")
  knots = np.array(_TUNED[subsampling])
  found = [np.interp(math.log(level), np.log(knots[:, 0]), column) for column in knots.T[1:]]
  frequency = np.add.outer(np.arange(8), np.arange(8)) / 14
  tables = []
  for size, slope, curvature, dc in (found[:4], found[4:]):
    table = level * size * (1 + slope * frequency + curvature * frequency**2)
    table[0, 0] *= dc
    tables.append(whole(table))
  return Point(tables[0], tables[1], LAMBDA_RATIO * level**2)


# --- Paths ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TablePath:
  """A path of quality from fine to coarse.

  Attributes:
    points: By rising lambda; between them and beyond, steps and lambda go on geometrically.
    subsampling: What the tables are for.
    name: Says where they are from.
    note: What users of the tables alone should know.
  """

  points: tuple[Point, ...]
  subsampling: str
  name: str = ""
  note: str = ""

  def at(self, lambda_: float) -> Point:
    """The point with a lambda."""
    if len(self.points) == 1:
      only = self.points[0]
      factor = math.sqrt(lambda_ / only.lambda_)
      return Point(whole(only.luma * factor), whole(only.chroma * factor), lambda_)
    logs = [math.log(p.lambda_) for p in self.points]
    x = math.log(lambda_)
    i = min(max(int(np.searchsorted(logs, x)), 1), len(logs) - 1)
    share = (x - logs[i - 1]) / (logs[i] - logs[i - 1])
    low, high = self.points[i - 1], self.points[i]
    if not 0 <= share <= 1:  # Beyond the ends, the shape stays and the level follows lambda.
      end = low if share < 0 else high
      return TablePath((end,), self.subsampling).at(lambda_)
    tables = [
      whole(np.exp((1 - share) * np.log(a) + share * np.log(b)))
      for a, b in zip(low.tables, high.tables)
    ]
    return Point(tables[0], tables[1], lambda_)


def tuned_path(subsampling: str = "4:2:0") -> TablePath:
  """`tuned` as a path."""
  levels = np.geomspace(1, 240, 40)
  return TablePath(tuple(tuned(level, subsampling) for level in levels), subsampling, "tuned")


def example_path(subsampling: str = "4:2:0") -> TablePath:
  """Tables that were trained on `cid22-train`, which come with the project: ljpeg/examples/.

      ./launch.py --main ljpeg.train --config ljpeg/configs/ljpeg.py --xid tables444
      ./launch.py --main ljpeg.train --config ljpeg/configs/ljpeg.py --xid tables420 \
        --config.model_config.subsampling=4:2:0
      python -m ljpeg.export train_xms/tables420 ljpeg/examples/tables420.json
  """
  name = {"4:2:0": "tables420", "4:4:4": "tables444"}[subsampling]
  return load(pathlib.Path(__file__).parent / "examples" / f"{name}.json")


def load(path: "os.PathLike[str] | str") -> TablePath:
  """Reads a path of tables, as `save` writes it.

  Raises:
    TablesError: It is missing, or not what `save` writes.
  """
  path = pathlib.Path(path)
  try:
    found = json.loads(path.read_text())
  except OSError as e:
    raise TablesError(f"{path}: no tables there ({e.strerror}).") from e
  except ValueError as e:
    raise TablesError(f"{path} is not a JSON file: {e}") from e
  if not isinstance(found, dict) or found.get("format") != FORMAT:
    raise TablesError(f"{path} holds no tables: its format should be {FORMAT!r}.")
  try:
    points = tuple(sorted((_point(p) for p in found["points"]), key=lambda point: point.lambda_))
    subsampling = str(found["subsampling"])
    name, note = str(found.get("name", path.stem)), str(found.get("note", ""))
  except (KeyError, TypeError, ValueError) as e:
    raise TablesError(f"{path}: {e}") from e
  lambdas = [p.lambda_ for p in points]
  if not points or len(set(lambdas)) != len(lambdas) or subsampling not in _TUNED:
    raise TablesError(
      f"{path}: it needs points of different lambda, and a subsampling of {', '.join(_TUNED)}."
    )
  return TablePath(points, subsampling, name, note)


def _point(record: Any) -> Point:
  tables = []
  for key in ("luma", "chroma"):
    table = np.array(record[key])
    if table.shape != (8, 8) or not np.array_equal(table, whole(table)):
      raise ValueError(f"{key} must be 8 rows of 8 whole numbers from 1 to 255.")
    tables.append(table.astype(np.int64))
  lambda_ = float(record["lambda"])
  if not (lambda_ > 0 and math.isfinite(lambda_)):
    raise ValueError(f"lambda must be over 0, not {lambda_}.")
  return Point(tables[0], tables[1], lambda_)


def save(path: "os.PathLike[str] | str", tables: TablePath) -> None:
  """Writes a path of tables as JSON."""
  record = {
    "format": FORMAT,
    "name": tables.name,
    **({"note": tables.note} if tables.note else {}),
    "subsampling": tables.subsampling,
    "points": [
      {"lambda": p.lambda_, "luma": p.luma.tolist(), "chroma": p.chroma.tolist()}
      for p in tables.points
    ],
  }
  runs.atomic_write(path, json.dumps(record) + "\n")
