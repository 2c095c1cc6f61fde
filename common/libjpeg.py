"""libjpeg and mozjpeg through the package `jpeglib`, from memory to memory, one call at a time.

jpeglib works on files, and which of its libraries it uses is a setting of the whole process. Every
call here goes through one lock, sets the library it needs, and sets back what was there before.
Calls of jpeglib by others at the same time are not guarded.
"""

import contextlib
import pathlib
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import numpy as np

MOZJPEG = "mozjpeg403"

_LOCK = threading.RLock()


class LibjpegError(ValueError):
  """The package is missing, or it could not do what it was asked; the message says what."""


def version() -> str:
  """Of the package.

  Raises:
    LibjpegError: It is not installed.
  """
  return str(_jpeglib().__version__)


def _jpeglib() -> Any:
  try:
    import jpeglib
  except ImportError as e:
    raise LibjpegError("the package jpeglib is not installed: pip install jpeglib") from e
  return jpeglib


@contextlib.contextmanager
def _file(library: Optional[str]) -> Iterator[tuple[Any, pathlib.Path]]:
  """jpeglib with a library of its choosing, and the path of a file that is removed again."""
  jpeglib = _jpeglib()
  with _LOCK, tempfile.TemporaryDirectory(prefix="ntc-jpeg-") as folder:
    before = jpeglib.version.get()
    if library is not None and before != library:
      jpeglib.version.set(library)
    try:
      yield jpeglib, pathlib.Path(folder) / "picture.jpg"
    except OSError as e:
      raise LibjpegError(f"libjpeg failed: {e}") from e
    finally:
      if library is not None and before not in (None, library):
        jpeglib.version.set(before)


def read_coefficients(
  data: bytes,
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], list[tuple[int, int]]]:
  """Quantized coefficients, tables and sampling factors of a JPEG file.

  Damaged data may be taken for what it looks like: check it by decoding first.

  Returns:
    Of each component: int16 [rows, cols, 8, 8] in natural order; int64 [8, 8]; (vertical,
    horizontal) sampling factor.
  """
  with _file(None) as (jpeglib, path):
    path.write_bytes(data)
    jpeg = jpeglib.read_dct(str(path))
    number = jpeg.num_components
    if number not in (1, 3):
      raise LibjpegError(f"{number} components; 1 or 3 can be read.")
    found = (jpeg.Y, jpeg.Cb, jpeg.Cr)[:number]
    components = tuple(np.array(c, np.int16) for c in found)
    tables = tuple(np.array(jpeg.get_component_qt(i), np.int64) for i in range(number))
    factors = [(int(v), int(h)) for v, h in np.array(jpeg.samp_factor).reshape(-1, 2)[:number]]
    return components, tables, factors


def mozjpeg(
  image: np.ndarray,
  quality: Optional[int] = None,
  tables: Optional[Sequence[np.ndarray]] = None,
  subsampling: str = "4:4:4",
) -> bytes:
  """A file by mozjpeg 4.0.3 with its defaults: trellis quantization, a progressive file.

  Args:
    image: uint8 [H, W, 3] RGB, or [H, W] grey.
    quality: 1..100, its own tables; or
    tables: luma and chroma (grey: luma), [8, 8] of whole numbers 1..255, natural order.
    subsampling: "4:4:4" or "4:2:0".
  """
  if (quality is None) == (tables is None):
    raise ValueError("Give either quality or tables.")
  grey = image.ndim == 2
  with _file(MOZJPEG) as (jpeglib, path):
    # Sides that are no multiple of 8 are the library's affair: it repeats the edges.
    pixels = np.ascontiguousarray(image[:, :, np.newaxis] if grey else image)
    jpeg = jpeglib.from_spatial(pixels)
    if not grey:
      jpeg.samp_factor = subsampling
    qt: Any = quality
    if tables is not None:
      qt = np.stack([np.asarray(t) for t in tables]).astype(np.uint16)
      if qt.min() < 1 or qt.max() > 255:
        raise ValueError("A table of baseline JPEG holds whole numbers from 1 to 255.")
    numbers = None if tables is None else ([0] if grey else [0, 1, 1][: 1 + 2 * (len(tables) > 1)])
    if tables is not None and not grey and len(tables) == 1:
      numbers = [0, 0, 0]
    jpeg.write_spatial(str(path), qt=qt, quant_tbl_no=numbers)
    return path.read_bytes()
