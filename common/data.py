"""Data sets by name, folder, glob or file: pictures for evaluation, seeded crops for training.

Every picture is read as uint8 RGB, `[H,W,3]`, the way `read_image` describes. A data set is

* a name in `configs.DATASETS` ("kodak"), whose value is a folder, a glob or a file;
* `sample`: colour photographs that ship inside scikit-image and scikit-learn, for evaluation;
* a folder (searched recursively), a glob (`*`, `?`, `[...]`; `**` for any depth), or one file.

A known name wins over a folder of that name in the working directory; write `./kodak` for that.
TensorFlow is imported only where a `tf.data.Dataset` is made.
"""

import concurrent.futures
import dataclasses
import glob
import hashlib
import importlib.util
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Callable, Optional, Protocol, TypeVar

import numpy as np
from PIL import Image

import configs
from common import hyper

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
  ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip

# Evaluation photographs inside the packages: (package, folder in it, file).
# Left out on purpose: drawings and plots, microscopy, the retina, the Hubble field, grey pictures,
# and the second picture of the motorcycle's stereo pair (it shows the same scene).
SAMPLE_FILES = (
  ("skimage", "data", "astronaut.png"),
  ("skimage", "data", "chelsea.png"),
  ("sklearn", "datasets/images", "china.jpg"),
  ("skimage", "data", "coffee.png"),
  ("sklearn", "datasets/images", "flower.jpg"),
  ("skimage", "data", "motorcycle_left.png"),
  ("skimage", "data", "rocket.jpg"),
)

_T = TypeVar("_T")
_R = TypeVar("_R")


class DataError(ValueError):
  """A data set cannot be used as asked; the message names the fix."""


class ImageSource(Protocol):
  """One picture of a data set, wherever it is kept."""

  @property
  def name(self) -> str:
    """The picture's name, unique in its data set."""

  def size(self) -> tuple[int, int]:
    """(height, width) in pixels, without decoding the picture."""

  def load(self) -> np.ndarray:
    """The picture, uint8 [H,W,3]."""


@dataclasses.dataclass(frozen=True)
class FileImage:
  """A picture in a file of its own.

  Attributes:
    name: Unique in the data set: the file's base name, or its path in the data set's folder
      (with "/") where two files share a base name.
    path: Where the file is.
  """

  name: str
  path: pathlib.Path

  def size(self) -> tuple[int, int]:
    """(height, width) in pixels, from the file's header."""
    with Image.open(self.path) as image:
      return image.height, image.width

  def load(self) -> np.ndarray:
    """The picture, uint8 [H,W,3], see `read_image`."""
    return read_image(self.path)


# --- Reading a picture ---------------------------------------------------------------------------


def read_image(path: "os.PathLike[str]") -> np.ndarray:
  """Any picture that Pillow reads, as uint8 RGB [H,W,3].

  * Pixels as stored: an EXIF orientation and colour profiles are not applied, so that all codecs
    see the same array.
  * Transparency is composited on white.
  * Grey is repeated over the channels; 16-bit grey is scaled by 255/65535 and rounded; of 16-bit
    colour, Pillow gives the high byte.
  * Of an animation or a multi-page file, the first picture.

  Raises:
    OSError, ValueError, ...: The file is missing, broken or truncated, or has pixels without a
      defined range (floating-point TIFF). Pillow's readers raise many types; see `_is_broken`.
  """
  with Image.open(path) as image:
    image.load()
    return to_rgb(image)


def to_rgb(image: Image.Image) -> np.ndarray:
  """A Pillow picture of any mode as uint8 RGB [H,W,3], by the rules of `read_image`."""
  if image.mode.startswith(("I", "F")):
    return _wide_grey_to_rgb(image)
  if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
    image = image.convert("LA") if image.mode == "La" else image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, image)
  return np.array(image.convert("RGB"))


def _wide_grey_to_rgb(image: Image.Image) -> np.ndarray:
  values = np.asarray(image)
  if not np.issubdtype(values.dtype, np.integer):
    raise ValueError(f"pixels of mode {image.mode} have no defined range; convert them to 8 bits")
  wide = values.astype(np.int64)
  if wide.size and (wide.min() < 0 or wide.max() > 65535):
    raise ValueError(
      f"32-bit integer pixels from {wide.min()} to {wide.max()} have no defined range; "
      "convert them to 8 or 16 bits"
    )
  grey = ((wide + 128) // 257).astype(np.uint8)
  return np.repeat(grey[:, :, np.newaxis], 3, axis=2)


def _is_broken(error: Exception) -> bool:
  """Whether an exception from reading a picture condemns the file, not this program or machine.

  Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, zlib.error, EOFError,
  IndexError, ... on damaged files; only running out of memory is known to be something else.
  """
  return not isinstance(error, MemoryError)


def _reason(error: Exception) -> str:
  if isinstance(error, FileNotFoundError):
    return "the file is gone"
  return f"{type(error).__name__}: {error}"


# --- Naming a data set ---------------------------------------------------------------------------


def resolve(dataset: str) -> Sequence[ImageSource]:
  """The pictures of a data set, in an order that depends on the files' names only.

  Args:
    dataset: A known name, a folder, a glob or an image file, see the module's docstring.

  Raises:
    DataError: The name is unknown, its folder is missing, or there is no picture in it.
  """
  return _resolve(dataset)[1]


def known_datasets() -> list[str]:
  """The names that `resolve` knows, sorted."""
  return sorted({*configs.DATASETS, *_BUILT_IN})


def _resolve(dataset: str) -> tuple[str, Sequence[ImageSource]]:
  """(label, pictures): the label stands for the data set in records and folder names."""
  if not isinstance(dataset, str) or not dataset:
    raise DataError(f"A dataset is a name, a folder, a glob or a file, not {dataset!r}.")
  if dataset in configs.DATASETS:
    return dataset, _resolve_setting(dataset, configs.DATASETS[dataset])
  if dataset in _BUILT_IN:
    return dataset, _BUILT_IN[dataset]()
  path = pathlib.Path(dataset).expanduser()
  if path.exists() or _is_glob(dataset):
    return _label(path), _from_path(path)
  raise DataError(
    f"Unknown dataset {dataset!r}. Known: {', '.join(known_datasets())}. "
    "A glob needs a '*', a folder must exist."
  )


def _resolve_setting(name: str, setting: str) -> Sequence[ImageSource]:
  path = pathlib.Path(setting).expanduser()
  if not path.exists() and not _is_glob(setting):
    message = f"Dataset {name!r} should be in {setting!r}, which does not exist on this machine. "
    message += f"Change DATASETS[{name!r}] in configs.py"
    if configs.DATA_DIR in path.parents:
      message += f", or set NTC_DATA_DIR to the folder that holds {path.name!r}"
      if path.parent != configs.DATA_DIR:
        message = message.replace(repr(path.name), repr(str(path.relative_to(configs.DATA_DIR))))
      message += f" (now {str(configs.DATA_DIR)!r})"
    raise DataError(message + ".")
  try:
    return _from_path(path)
  except DataError as e:
    raise DataError(f"Dataset {name!r} (DATASETS[{name!r}] in configs.py): {e}") from e


def _is_glob(text: str) -> bool:
  return any(c in text for c in "*?[")


def _from_path(path: pathlib.Path) -> list[ImageSource]:
  """Pictures of an existing folder or file, or of a glob."""
  if path.is_dir():
    files = sorted(_walk(path))
    if not files:
      raise DataError(f"Folder {str(path)!r} holds no picture ({_suffixes()}).")
    return _named(files, path)
  if path.exists():
    if path.suffix.lower() not in IMAGE_SUFFIXES:
      raise DataError(f"File {str(path)!r} is not a picture ({_suffixes()}).")
    return [FileImage(path.name, path)]
  matches = glob.glob(str(path), recursive=True)  # noqa: PTH207
  found: set[pathlib.Path] = set()
  for match in map(pathlib.Path, matches):
    if match.is_dir():
      found.update(_walk(match))
    elif _is_picture(match.name):
      found.add(match)
  if not found:
    there = f"matches {len(matches)} paths, but no picture" if matches else "matches nothing"
    raise DataError(f"Glob {str(path)!r} {there} ({_suffixes()}); quote it for the shell.")
  return _named(sorted(found), _fixed_part(path))


def _suffixes() -> str:
  return ", ".join(f"*{s}" for s in IMAGE_SUFFIXES)


def _is_picture(name: str) -> bool:
  return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Image files below a folder; hidden ones are left out, links are followed, loops are not."""
  entered = set()
  todo = [str(folder)]
  while todo:
    current = todo.pop()
    status = os.stat(current)  # noqa: PTH116
    if (status.st_dev, status.st_ino) in entered:
      continue
    entered.add((status.st_dev, status.st_ino))
    with os.scandir(current) as entries:
      for entry in entries:
        if entry.name.startswith("."):
          continue
        if entry.is_dir():
          todo.append(entry.path)
        elif _is_picture(entry.name) and entry.is_file():
          yield pathlib.Path(entry.path)


def _fixed_part(pattern: pathlib.Path) -> pathlib.Path:
  """The folder of a glob before its first wildcard."""
  fixed = []
  for part in pattern.parts[:-1]:
    if _is_glob(part):
      break
    fixed.append(part)
  return pathlib.Path(*fixed)


def _label(path: pathlib.Path) -> str:
  """A name for a folder, file or glob: photos, photos/*.png -> photos; photos/a* -> photos-a.

  Data sets of the same label are told apart by their hash.
  """
  if path.exists() or not _is_glob(str(path)):
    return hyper.safe_name(path.resolve().name)
  fixed = _fixed_part(path)
  rest = path.relative_to(fixed).as_posix()
  rest = re.sub(r"(^|/)\*+(\.\w+)?(?=/|$)", "", rest).strip("/")
  return hyper.safe_name("-".join(p for p in (fixed.resolve().name, rest) if p))


def _named(files: Sequence[pathlib.Path], root: pathlib.Path) -> list[ImageSource]:
  """Sources with unique names, in order of their paths below `root`."""
  relative = sorted((f.relative_to(root).as_posix(), f) for f in files)
  count: dict[str, int] = {}
  for _, file in relative:
    count[file.name] = count.get(file.name, 0) + 1
  return [FileImage(f.name if count[f.name] == 1 else r, f) for r, f in relative]


def _package_dir(package: str) -> pathlib.Path:
  """The folder of an installed package, without importing it."""
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise DataError(
      f"The sample pictures need the package {package!r}: pip install -r requirements.txt."
    )
  return pathlib.Path(next(iter(spec.submodule_search_locations)))


def _from_packages(files: Iterable[tuple[str, str, str]]) -> list[ImageSource]:
  sources: list[ImageSource] = []
  for package, folder, name in files:
    path = _package_dir(package) / folder / name
    if not path.is_file():
      raise DataError(
        f"The installed {package!r} has no {folder}/{name}: install the pinned version, "
        "pip install -r requirements.txt."
      )
    sources.append(FileImage(name, path))
  return sources


def _sample() -> list[ImageSource]:
  return _from_packages(SAMPLE_FILES)


_BUILT_IN: dict[str, Callable[[], Sequence[ImageSource]]] = {"sample": _sample}


# --- Evaluation ----------------------------------------------------------------------------------


class EvalImages:
  """The pictures of a data set, decoded one by one; memory does not grow with the data set.

  A file whose header cannot be read is left out at once, a file whose pixels cannot be read when
  they are first asked for: then `len`, `names` and `paths` shrink. Both are named in the log and
  in `skipped`. Iterating passes over broken files.

  Attributes:
    name: The data set's label, fit for a folder's name.
    skipped: Name -> reason, of the broken files met so far.
  """

  def __init__(self, name: str, sources: Sequence[ImageSource]):
    self.name = name
    self.skipped: dict[str, str] = {}
    self._digests: dict[str, bytes] = {}
    results = _parallel(_try_size, sources)
    self._sources = [s for s, (size, _) in zip(sources, results) if size is not None]
    for source, (size, reason) in zip(sources, results):
      if size is None:
        self._skip(source, reason)
    self._check_some_left()

  def __len__(self) -> int:
    return len(self._sources)

  def __getitem__(self, index: int) -> tuple[str, np.ndarray]:
    """(name, picture uint8 [H,W,3]).

    Raises:
      DataError: That picture is broken; it is left out from now on.
    """
    source = self._sources[index]
    image = self._load(source)
    if image is None:
      raise DataError(f"{source.name} of {self.name!r} is broken: {self.skipped[source.name]}")
    return source.name, image

  def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
    for source in list(self._sources):
      image = self._load(source)
      if image is not None:
        yield source.name, image
    self._check_some_left()

  @property
  def names(self) -> list[str]:
    """The pictures' names, unique, in order."""
    return [s.name for s in self._sources]

  @property
  def paths(self) -> list[pathlib.Path]:
    """Where the pictures are; the name stands for one that has no file of its own."""
    return [getattr(s, "path", pathlib.Path(s.name)) for s in self._sources]

  @property
  def hash(self) -> str:
    """SHA-256 (hex) over names, sizes and pixels of all pictures that can be read.

    Pictures that were not decoded before are decoded for it, one by one.
    """
    for source in list(self._sources):
      if source.name not in self._digests:
        self._load(source)
    self._check_some_left()
    whole = hashlib.sha256()
    for source in self._sources:
      whole.update(self._digests[source.name])
    return whole.hexdigest()

  def _load(self, source: ImageSource) -> Optional[np.ndarray]:
    try:
      image = source.load()
    except Exception as e:
      if not _is_broken(e):
        raise
      self._skip(source, _reason(e))
      return None
    if source.name not in self._digests:
      digest = hashlib.sha256(f"{source.name}\0{image.shape}\0".encode())
      digest.update(np.ascontiguousarray(image).data)
      self._digests[source.name] = digest.digest()
    return image

  def _skip(self, source: ImageSource, reason: str) -> None:
    self.skipped[source.name] = reason
    self._sources = [s for s in self._sources if s.name != source.name]
    log.warning("Skipped %s of %s: %s", source.name, self.name, reason)

  def _check_some_left(self) -> None:
    if not self._sources:
      name, reason = next(iter(self.skipped.items()))
      raise DataError(
        f"No picture of {self.name!r} can be read; {len(self.skipped)} are broken, "
        f"the first is {name}: {reason}"
      )


def load_eval_images(dataset: str) -> EvalImages:
  """The pictures of a data set for evaluation, see `EvalImages`.

  Args:
    dataset: As for `resolve`.

  Raises:
    DataError: As `resolve`, or no picture can be read.
  """
  return EvalImages(*_resolve(dataset))


def _try_size(source: ImageSource) -> tuple[Optional[tuple[int, int]], str]:
  """((height, width), "") or (None, why the header cannot be read)."""
  try:
    return source.size(), ""
  except Exception as e:
    if not _is_broken(e):
      raise
    return None, _reason(e)


def _parallel(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
  """`function` of every item, in order, by several threads (for files that are slow to open)."""
  with concurrent.futures.ThreadPoolExecutor(min(32, 4 + 2 * (os.cpu_count() or 1))) as pool:
    return list(pool.map(function, items))
