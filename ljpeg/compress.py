"""Pictures to small .jpg files: for a rate, for a PSNR, or at a middle quality.

    python -m ljpeg.eval compress photo.png photo.jpg
    python -m ljpeg.eval compress photo.png photo.jpg --target_bpp 0.8
    python -m ljpeg.eval compress photo.png photo.jpg --target_psnr 34 --effort best
    python -m ljpeg.eval compress photo.png photo.jpg --workdir RUN

Plain Python: TensorFlow is not imported. The files are baseline JPEG that every program opens.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, Optional, Union

import numpy as np
from PIL import Image, ImageCms, ImageOps

from common import data, metrics, runs
from ljpeg import jpeg_file, rdo, tables

PathLike = Union[str, pathlib.Path]

# Of a run: the tables that its training found, written by `tables.save`.
TABLES_FILE = "tables.json"

EFFORTS = (*rdo.EFFORTS, "itinf")
_MIDDLE_LEVEL = 16.0

# A search for a rate or a PSNR ends this near to it, or after so many files.
_BPP_TOLERANCE, _PSNR_TOLERANCE, _MAX_FILES = 0.005, 0.02, 14
_LAMBDAS = (0.3, tables.LAMBDA_RATIO * tables.MAX_LEVEL**2 * 4)


class CompressError(ValueError):
  """A picture cannot be compressed as asked; the message says why."""


@dataclasses.dataclass(frozen=True)
class Compressed:
  """A file, and how it came about.

  Attributes:
    file: The .jpg file.
    bpp: 8 * bytes / pixels.
    psnr_db: Of the pixels that Pillow decodes against the picture's; `math.inf` if identical.
    size: (height, width).
    components: 1 for grey, 3 for colour.
    subsampling: "4:4:4" or "4:2:0".
    lambda_: Squared error that a bit was worth.
    tables: Luma and chroma, [8, 8].
    reached: Whether the target was met.
    remark: Why it was not, and what else is worth knowing; or "".
  """

  file: bytes
  bpp: float
  psnr_db: float
  size: tuple[int, int]
  components: int
  subsampling: str
  lambda_: float
  tables: tuple[np.ndarray, ...]
  reached: bool = True
  remark: str = ""


# --- Reading a picture ----------------------------------------------------------------------------


def read_picture(path: PathLike) -> np.ndarray:
  """A picture for compressing: uint8 [H, W, 3] RGB, or [H, W] where all channels are equal.

  * The EXIF orientation is applied: the .jpg file holds none.
  * Colour profiles other than sRGB are converted to sRGB; CMYK without one by Pillow's formula.
  * Transparency is composited on white; palettes are resolved.
  * 16-bit grey is scaled and rounded; of 16-bit colour, Pillow reads the high byte.
  * Of an animation or a multi-page file, the first picture.

  Raises:
    CompressError: It is missing, no picture, truncated, or has pixels without a defined range.
  """
  try:
    with Image.open(path) as image:
      image.load()
      profile = image.info.get("icc_profile")
      upright = ImageOps.exif_transpose(image)
      rgb = data.to_rgb(_in_srgb(upright, profile))
  except Image.DecompressionBombError as e:
    raise CompressError(f"{path} is too large: {e}") from e
  except FileNotFoundError as e:
    raise CompressError(f"{path}: no such file.") from e
  except (OSError, ValueError, SyntaxError, EOFError) as e:
    raise CompressError(f"{path} is not a whole picture that can be read: {e}") from e
  if np.array_equal(rgb[..., 0], rgb[..., 1]) and np.array_equal(rgb[..., 0], rgb[..., 2]):
    return np.ascontiguousarray(rgb[..., 0])
  return rgb


def _in_srgb(image: Image.Image, profile: Optional[bytes]) -> Image.Image:
  if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
    return image
  with contextlib.suppress(ImageCms.PyCMSError, OSError):  # A broken profile says nothing.
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if "srgb" in ImageCms.getProfileDescription(source).casefold():
      return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    converted = ImageCms.profileToProfile(
      image, source, ImageCms.createProfile("sRGB"), outputMode=mode
    )
    return converted or image
  return image


# --- Compressing ----------------------------------------------------------------------------------


class _Encoder:
  """Makes files of one picture at any lambda."""

  def __init__(self, image: np.ndarray, path: tables.TablePath, effort: str):
    self.image = image
    self.path = path
    self.effort = effort
    self._source = rdo.source(image, path.subsampling)
    self.pixels = image.shape[0] * image.shape[1]

  def search(self, lambda_: float, effort: rdo.Effort) -> rdo.Result:
    return rdo.optimise(self._source, self.path.at(lambda_).tables, lambda_, effort)

  def make(self, lambda_: float, thorough: bool = False) -> Compressed:
    """A file. `thorough`: with the effort "itinf", the tables are fitted to the picture."""
    if self.effort == "itinf" and thorough:
      found = rdo.optimise_with_tables(self._source, self.path.at(lambda_).tables, lambda_)
    else:
      effort = rdo.DEFAULT if self.effort == "itinf" else rdo.EFFORTS[self.effort]
      found = self.search(lambda_, effort)
    file = found.file()
    return Compressed(
      file=file,
      bpp=8 * len(file) / self.pixels,
      psnr_db=psnr_db(self.image, file),
      size=found.size,
      components=len(found.components),
      subsampling=found.subsampling,
      lambda_=lambda_,
      tables=found.tables,
    )


def psnr_db(image: np.ndarray, file: bytes) -> float:
  """PSNR in dB of a .jpg file as Pillow decodes it, against uint8 [H, W, 3] or [H, W]."""
  with Image.open(io.BytesIO(file)) as decoded:
    pixels = np.array(decoded.convert("RGB"))
  if image.ndim == 2:
    image = np.repeat(image[:, :, np.newaxis], 3, axis=2)
  return metrics.psnr_db(image, pixels)


def encode(
  image: np.ndarray,
  paths: Optional[Sequence[tables.TablePath]] = None,
  target_bpp: Optional[float] = None,
  target_psnr: Optional[float] = None,
  lambda_: Optional[float] = None,
  effort: str = "default",
) -> Compressed:
  """A .jpg file of a picture.

  Args:
    image: uint8 [H, W, 3] RGB, or [H, W] grey.
    paths: The tables to choose from; of more than one, the path that gives the least squared
      error + lambda * bits. Default: `tables.example_path` for 4:2:0 and for 4:4:4.
    target_bpp: Bits per pixel of the whole file; the best file that is not above.
    target_psnr: In dB; a file that is hardly above it.
    lambda_: Neither of these: squared error that a bit is worth. Default: a middle quality, or that
      of a path of one point.
    effort: One of EFFORTS, from the fastest to the smallest files.

  Raises:
    CompressError: The arguments do not go together, or the picture is too large for JPEG.
  """
  given = [v for v in (target_bpp, target_psnr, lambda_) if v is not None]
  if len(given) > 1:
    raise CompressError("Give a rate, a PSNR or a lambda: one of them.")
  if not all(v > 0 and math.isfinite(v) for v in given):
    raise CompressError(f"A target must be over 0, not {given[0]}.")
  if effort not in EFFORTS:
    raise CompressError(f"Unknown effort {effort!r}. Known: {', '.join(EFFORTS)}.")
  if max(image.shape[:2]) > jpeg_file.MAX_SIDE:
    raise CompressError(
      f"A JPEG file has at most {jpeg_file.MAX_SIDE} pixels a side; the picture has "
      f"{image.shape[1]}x{image.shape[0]}."
    )
  if paths is None:
    paths = [tables.example_path("4:2:0"), tables.example_path("4:4:4")]
  if image.ndim == 2:
    paths = paths[:1]
  best = paths[0]
  if target_bpp is None and target_psnr is None:
    if lambda_ is None:
      only = best.points[0].lambda_ if len(best.points) == 1 else None
      lambda_ = only or tables.LAMBDA_RATIO * _MIDDLE_LEVEL**2
    best = _cheapest(image, paths, lambda_)
    return _Encoder(image, best, effort).make(lambda_, thorough=True)
  found = _meet(_Encoder(image, best, effort), target_bpp, target_psnr)
  chosen = _cheapest(image, paths, found.lambda_)
  if chosen is not best:
    found = _meet(_Encoder(image, chosen, effort), target_bpp, target_psnr)
  return found


# Which subsampling suits a picture shows in its middle.
_SAMPLE_SIDE = 256


def _cheapest(
  image: np.ndarray, paths: Sequence[tables.TablePath], lambda_: float
) -> tables.TablePath:
  """The path whose files cost least, error + lambda * bits, judged by the picture's middle."""
  if len(paths) == 1:
    return paths[0]
  top, left = (max(0, (side - _SAMPLE_SIDE) // 2) // 16 * 16 for side in image.shape[:2])
  middle = image[top : top + _SAMPLE_SIDE, left : left + _SAMPLE_SIDE]

  def cost(path: tables.TablePath) -> float:
    source = rdo.source(middle, path.subsampling)
    return rdo.optimise(source, path.at(lambda_).tables, lambda_, rdo.FAST).cost(lambda_)

  return min(paths, key=cost)


def _meet(
  encoder: _Encoder,
  target_bpp: Optional[float],
  target_psnr: Optional[float],
) -> Compressed:
  if target_bpp is not None:
    bpp = target_bpp

    def above_bpp(c: Compressed) -> float:  # Over 0: too large.
      return math.log(c.bpp / bpp)

    found = _bisect(encoder, above_bpp, -_BPP_TOLERANCE)
    if found.bpp > bpp:
      remark = f"no file of {bpp:g} bpp can be made: this is the smallest."
      return dataclasses.replace(found, reached=False, remark=remark)
    return found
  assert target_psnr is not None
  psnr = target_psnr

  def below_psnr(c: Compressed) -> float:
    return psnr - c.psnr_db if math.isfinite(c.psnr_db) else -1e9

  # A small file that is good enough: the search is for the largest lambda.
  found = _bisect(encoder, below_psnr, -_PSNR_TOLERANCE, rising=True)
  if found.psnr_db < psnr:
    remark = f"no file of {psnr:g} dB can be made: this is the best."
    return dataclasses.replace(found, reached=False, remark=remark)
  return found


def _bisect(
  encoder: _Encoder,
  excess: Callable[[Compressed], float],
  tolerance: float,
  rising: bool = False,
) -> Compressed:
  """The file whose `excess` is nearest to 0 from below; where none is, the one with the least.

  Args:
    encoder: Makes the files.
    excess: How far a file misses the target; 0 or less: it meets it.
    tolerance: Enough where the excess is from here to 0.
    rising: Whether the excess rises with lambda (else it falls).
  """
  low, high = (math.log(v) for v in _LAMBDAS)
  met: Optional[Compressed] = None
  least: Optional[Compressed] = None
  at: dict[float, float] = {}
  x = math.log(tables.LAMBDA_RATIO * _MIDDLE_LEVEL**2)
  for _ in range(_MAX_FILES):
    made = encoder.make(math.exp(x))
    miss = excess(made)
    at[x] = miss
    if miss <= 0 and (met is None or miss > excess(met)):
      met = made
    if least is None or miss < excess(least):
      least = made
    if tolerance <= miss <= 0:
      break
    if (miss > 0) == rising:
      high = min(high, x)
    else:
      low = max(low, x)
    if high - low < 1e-4:
      break
    x = _next(at, low, high, tolerance / 2)
  assert least is not None
  best = met or least
  if encoder.effort == "itinf":
    for step in (0.0, 0.01, 0.03):
      made = encoder.make(best.lambda_ * math.exp(-step if rising else step), thorough=True)
      if excess(made) <= max(0.0, excess(best)):
        return made
  return best


def _next(at: dict[float, float], low: float, high: float, aim: float) -> float:
  """Where to try next: on the line through the two nearest results, within the bracket."""
  middle = (low + high) / 2
  if len(at) == 1:
    ((x, miss),) = at.items()
    guess = x + (miss * 2 if abs(miss) < 4 else math.copysign(4, miss))
    if low < guess < high:
      return guess
    edge = high if guess >= high else low
    return edge if edge not in at else middle
  (x0, y0), (x1, y1) = sorted(at.items(), key=lambda item: abs(item[1]))[:2]
  if y0 != y1 and x0 != x1:
    guess = x0 + (aim - y0) * (x1 - x0) / (y1 - y0)
    margin = 0.02 * (high - low)
    if low + margin < guess < high - margin:
      return guess
    if guess >= high and high not in at:
      return high
    if guess <= low and low not in at:
      return low
  return middle


def compress(
  picture: PathLike,
  out: PathLike,
  paths: Optional[Sequence[tables.TablePath]] = None,
  target_bpp: Optional[float] = None,
  target_psnr: Optional[float] = None,
  effort: str = "default",
  force: bool = False,
) -> Compressed:
  """Compresses the picture in a file into a .jpg file; arguments as `encode`.

  The file is written whole or not at all; one that exists stays without `force`.

  Raises:
    CompressError: The message says why.
  """
  out = pathlib.Path(out)
  if out.suffix.lower() not in (".jpg", ".jpeg"):
    raise CompressError(f"{out}: the output is a JPEG file; name it .jpg.")
  if out.exists() and not force:
    raise CompressError(f"{out} exists; --force overwrites it.")
  if not out.parent.is_dir():
    raise CompressError(f"There is no folder {out.parent}.")
  found = encode(read_picture(picture), paths, target_bpp, target_psnr, effort=effort)
  runs.atomic_write(out, found.file)
  return found


def run_tables(workdir: PathLike) -> tables.TablePath:
  """The tables that a run has learned.

  Raises:
    CompressError: It has none (yet).
  """
  path = pathlib.Path(workdir)
  path = path / TABLES_FILE if path.is_dir() else path
  try:
    return tables.load(path)
  except tables.TablesError as e:
    raise CompressError(str(e)) from e


# --- The command ----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise CompressError(f"{message} (see python -m ljpeg.eval compress --help).")


def main(argv: Sequence[str]) -> int:
  """`python -m ljpeg.eval compress`; returns the exit code: 0 done, 1 failed, 2 usage."""
  parser = _Parser(
    prog="python -m ljpeg.eval compress",
    description="Compresses a picture to a .jpg file that every program opens.",
    allow_abbrev=False,
  )
  parser.add_argument("picture", help="any picture that Pillow reads")
  parser.add_argument("out", help="the .jpg file")
  parser.add_argument(
    "--workdir",
    metavar="RUN",
    help=f"a run, or a {TABLES_FILE}: its tables; default: those of the shipped example",
  )
  parser.add_argument("--target_bpp", type=float, help="bits per pixel at most")
  parser.add_argument("--target_psnr", type=float, help="PSNR in dB at least")
  parser.add_argument("--effort", choices=EFFORTS, default="default", help="fast ... smallest")
  parser.add_argument("--force", action="store_true", help="overwrite the file")
  try:
    args = parser.parse_args(list(argv))
  except CompressError as e:
    print(f"Error: {e}", file=sys.stderr)
    return 2
  try:
    paths = None if args.workdir is None else [run_tables(args.workdir)]
    found = compress(
      args.picture, args.out, paths, args.target_bpp, args.target_psnr, args.effort, args.force
    )
  except (CompressError, jpeg_file.JpegFileError, OSError) as e:
    print(f"Error: {e}", file=sys.stderr)
    return 1
  kind = "grey" if found.components == 1 else found.subsampling
  print(
    f"{args.out}: {len(found.file)} bytes, {found.bpp:.4f} bpp, {found.psnr_db:.2f} dB, "
    f"{found.size[1]}x{found.size[0]}, {kind}"
  )
  if found.remark:
    print(f"Note: {found.remark}", file=sys.stderr)
  if paths and paths[0].note:
    print(f"Note: {paths[0].note}", file=sys.stderr)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
