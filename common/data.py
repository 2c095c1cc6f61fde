"""Data sets by name, folder, glob or file: pictures for evaluation, seeded crops for training.

Every picture is read as uint8 RGB, `[H,W,3]`, the way `read_image` describes. A data set is

* a name in `configs.DATASETS` ("kodak"), whose value is a folder, a glob or a file;
* `sample`: colour photographs that ship inside scikit-image and scikit-learn, for evaluation;
* `sample_train`: generated pictures (common/dead_leaves.py, made once into
  `configs.DATA_CACHE_DIR`) and grey textures that ship inside scikit-image, for training;
* a folder (searched recursively), a glob (`*`, `?`, `[...]`; `**` for any depth), or one file;
* an archive (.tar, .tar.gz, .zip, ...: unpacked once, common/unpack.py), or a .npy array of
  pictures, uint8 [N,H,W,3] or grey [N,H,W];
* `tfds:<name>[:<split>]`, a data set of TensorFlow Datasets that has a feature `image` (needs the
  package tensorflow-datasets); its pictures are written to the cache folder once, as PNG.

A known name wins over a folder of that name in the working directory; write `./kodak` for that.
TensorFlow is imported only where a `tf.data.Dataset` is made.
"""

import atexit
import concurrent.futures
import dataclasses
import enum
import functools
import glob
import hashlib
import importlib.util
import io
import logging
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional, Protocol, TypeVar

import numpy as np
from PIL import Image

import configs
from common import datasets, unpack

if TYPE_CHECKING:
  import tensorflow as tf

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

# Pictures for training inside the packages, besides the generated ones.
SAMPLE_TRAIN_FILES = (
  ("skimage", "data", "brick.png"),
  ("skimage", "data", "camera.png"),
  ("skimage", "data", "grass.png"),
  ("skimage", "data", "gravel.png"),
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

  def load_crop(self, top: int, left: int, side: int) -> np.ndarray:
    """`load()[top:top+side, left:left+side]`, perhaps sooner. Training only: may use TensorFlow."""


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

  def load_crop(self, top: int, left: int, side: int) -> np.ndarray:
    """`load()[top:top+side, left:left+side]`; of a JPEG file, little more than that is decoded."""
    if self.path.suffix.lower() in (".jpg", ".jpeg"):
      crop = _decode_jpeg_crop(self.path.read_bytes(), top, left, side)
      if crop is not None:
        return crop
    return self.load()[top : top + side, left : left + side]


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


def _decode_jpeg_crop(encoded: bytes, top: int, left: int, side: int) -> Optional[np.ndarray]:
  """A square of a JPEG picture, uint8 [side,side,3], or None where only Pillow reads it right.

  Exactly what Pillow gives: the accurate DCT is Pillow's default, and with a margin of 16 pixels
  (one coded block at 4:2:0) the smooth upsampling of colours sees the same neighbours.
  """
  import tensorflow as tf

  if b"\xff\xd9" not in encoded[-64:]:
    return None  # Truncated, perhaps: Pillow tells, whichever crop is asked for.
  with Image.open(io.BytesIO(encoded)) as image:
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
      return None
    rows, columns = image.height, image.width
  y, x = max(0, top - 16), max(0, left - 16)
  window = [y, x, min(rows, top + side + 16) - y, min(columns, left + side + 16) - x]
  with tf.device("CPU:0"):
    pixels = tf.image.decode_and_crop_jpeg(
      encoded, window, channels=3, dct_method="INTEGER_ACCURATE"
    )
  return pixels.numpy()[top - y : top - y + side, left - x : left - x + side]


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
  return datasets.known()


def _resolve(dataset: str) -> tuple[str, Sequence[ImageSource]]:
  """(label, pictures): the label stands for the data set in records and folder names."""
  if not isinstance(dataset, str) or not dataset:
    raise DataError(f"A dataset is a name, a folder, a glob or a file, not {dataset!r}.")
  if dataset in configs.DATASETS:
    return dataset, _resolve_setting(dataset, configs.DATASETS[dataset])
  if dataset in _BUILT_IN:
    return dataset, _BUILT_IN[dataset]()
  if dataset.startswith(datasets.TFDS):
    return datasets.label(dataset), _from_tfds(dataset)
  path = pathlib.Path(dataset).expanduser()
  if path.exists() or datasets.is_glob(dataset):
    return datasets.label(dataset), _from_path(path)
  raise DataError(
    f"Unknown dataset {dataset!r}. Known: {', '.join(known_datasets())}. "
    "A glob needs a '*', a folder must exist."
  )


def _resolve_setting(name: str, setting: str) -> Sequence[ImageSource]:
  path = pathlib.Path(setting).expanduser()
  if not path.exists() and not datasets.is_glob(setting):
    message = f"Dataset {name!r} should be in {setting!r}, which does not exist on this machine. "
    message += f"Change DATASETS[{name!r}] in configs.py"
    if configs.DATA_DIR in path.parents:
      below = str(path.relative_to(configs.DATA_DIR))
      message += f", or set NTC_DATA_DIR to the folder that holds {below!r}"
      message += f" (now {str(configs.DATA_DIR)!r})"
    raise DataError(message + ".")
  try:
    return _from_path(path)
  except DataError as e:
    raise DataError(f"Dataset {name!r} (DATASETS[{name!r}] in configs.py): {e}") from e


def _from_path(path: pathlib.Path) -> list[ImageSource]:
  """Pictures of an existing folder or file, or of a glob."""
  if path.is_dir():
    files = sorted(_walk(path))
    if not files:
      raise DataError(f"Folder {str(path)!r} holds no picture ({_suffixes()}).")
    return _named(files, path)
  if path.exists():
    if unpack.is_archive(path):
      return _from_archive(path)
    if path.suffix.lower() == ".npy":
      return _from_array(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
      raise DataError(
        f"File {str(path)!r} is no picture ({_suffixes()}), archive "
        f"({', '.join(unpack.ARCHIVE_SUFFIXES)}) or array (.npy)."
      )
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


def _from_archive(path: pathlib.Path) -> list[ImageSource]:
  try:
    folder = unpack.unpacked(path, _is_picture)
  except unpack.ArchiveError as e:
    raise DataError(str(e)) from e
  except OSError as e:
    raise DataError(
      f"Archive {str(path)!r} cannot be unpacked into {str(configs.DATA_CACHE_DIR)!r} ({e}). "
      "Make room, or set NTC_DATA_CACHE_DIR to another folder."
    ) from e
  return _named(sorted(_walk(folder)), folder)


@functools.lru_cache(maxsize=8)
def _open_array(path: pathlib.Path, size: int, time_ns: int) -> np.ndarray:
  """A .npy file, mapped into memory; `size` and `time_ns` tell a changed file from the old one."""
  del size, time_ns
  array = np.load(path, mmap_mode="r", allow_pickle=False)
  shape_fits = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))
  if array.dtype != np.uint8 or not shape_fits or 0 in array.shape:
    raise DataError(
      f"Array {str(path)!r} is {array.dtype} {list(array.shape)}; pictures are uint8 [N,H,W,3] or "
      "grey [N,H,W]. Of numbers in 0..1: np.save(file, np.round(array * 255).astype('uint8'))."
    )
  return array


@dataclasses.dataclass(frozen=True)
class ArrayImage:
  """A picture in a .npy array; read from disk when it is asked for.

  Attributes:
    name: "<file>-<index>".
    file: The array's file.
    index: Which of its pictures.
  """

  name: str
  file: pathlib.Path
  index: int

  def _array(self) -> np.ndarray:
    status = self.file.stat()
    return _open_array(self.file, status.st_size, status.st_mtime_ns)

  def size(self) -> tuple[int, int]:
    """(height, width) in pixels."""
    return self._array().shape[1], self._array().shape[2]

  def load(self) -> np.ndarray:
    """The picture, uint8 [H,W,3]; grey is repeated over the channels."""
    return self._rgb(self._array()[self.index])

  def load_crop(self, top: int, left: int, side: int) -> np.ndarray:
    """`load()[top:top+side, left:left+side]`; only that is read."""
    return self._rgb(self._array()[self.index, top : top + side, left : left + side])

  def _rgb(self, pixels: np.ndarray) -> np.ndarray:
    pixels = np.array(pixels)
    if pixels.ndim == 2:
      pixels = pixels[:, :, np.newaxis]
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _from_array(path: pathlib.Path) -> list[ImageSource]:
  path = path.absolute()
  try:
    status = path.stat()
    count = len(_open_array(path, status.st_size, status.st_mtime_ns))
  except DataError:
    raise
  except (OSError, ValueError, EOFError) as e:
    raise DataError(f"Array {str(path)!r} cannot be read ({type(e).__name__}: {e}).") from e
  return [ArrayImage(f"{path.stem}-{i:06d}", path, i) for i in range(count)]


def _from_tfds(dataset: str) -> list[ImageSource]:
  """Pictures of "tfds:<name>[:<split>]"; the split is "train" unless it is named."""
  folder = configs.DATA_CACHE_DIR / "tfds" / datasets.label(dataset)
  if not folder.is_dir():
    try:
      import tensorflow_datasets as tfds
    except ImportError as e:
      raise DataError(
        f"{dataset!r} needs TensorFlow Datasets: pip install 'tensorflow-datasets<4.9.5'."
      ) from e
    name, _, split = dataset[len(datasets.TFDS) :].partition(":")
    try:
      examples = tfds.load(name, split=split or "train")
    except Exception as e:  # Of many types; their texts name what there is.
      raise DataError(f"{dataset!r}: {type(e).__name__}: {e}") from e

    def write(target: pathlib.Path) -> None:
      from tqdm import tqdm

      for i, example in enumerate(tqdm(examples, desc=dataset, unit="picture", disable=None)):
        if "image" not in example:
          raise DataError(f"{dataset!r} has no feature 'image', but: {', '.join(example)}.")
        pixels = np.asarray(example["image"])
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        Image.fromarray(pixels).save(target / f"{i:06d}.png")

    unpack.make_whole(folder, write)
  return _from_path(folder)


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
    if datasets.is_glob(part):
      break
    fixed.append(part)
  return pathlib.Path(*fixed)


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


def _sample_train() -> list[ImageSource]:
  from common import dead_leaves

  folder = configs.DATA_CACHE_DIR / f"sample_train-v{dead_leaves.VERSION}"
  if not folder.is_dir():
    try:
      unpack.make_whole(folder, dead_leaves.write_pictures)
    except OSError as e:
      raise DataError(
        f"The pictures of 'sample_train' cannot be made in {str(folder.parent)!r} ({e}). "
        "Change DATA_CACHE_DIR in configs.py, or set NTC_DATA_CACHE_DIR."
      ) from e
  leaves: list[ImageSource] = [FileImage(n, folder / n) for n in dead_leaves.file_names()]
  return leaves + _from_packages(SAMPLE_TRAIN_FILES)


_BUILT_IN: dict[str, Callable[[], Sequence[ImageSource]]] = {
  "sample": _sample,
  "sample_train": _sample_train,
}


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


# --- Training ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The settings of a training or validation pipeline, as in a config's `train_data_config`.

  Attributes:
    dataset: As for `resolve`.
    batchsize: Crops in a batch.
    patchsize: Height and width of a crop, in pixels.
    patches_per_image: Consecutive crops of one picture. Each epoch visits each picture so often.
    max_images: Takes the first so many files (in order of their names), before they are split.
    val_split: The fraction of the files that is kept for validation and never trained on.
    val_split_seed: Chooses those files. The run's seed does not: runs that differ in their seed
      are validated on the same files.
    cache_mb: Memory for decoded pictures, in MiB; what does not fit is decoded at each use.
    flip: Whether half of the crops, by chance, are mirrored left to right.
  """

  dataset: str
  batchsize: int
  patchsize: int
  patches_per_image: int = 1
  max_images: Optional[int] = None
  val_split: Optional[float] = None
  val_split_seed: int = 0
  cache_mb: int = 2048
  flip: bool = False

  def __post_init__(self) -> None:
    for key in ("batchsize", "patchsize", "patches_per_image", "max_images"):
      value = getattr(self, key)
      if value is not None and value < 1:
        raise DataError(f"{key}={value!r} of the data config must be at least 1.")
    if self.val_split is not None and not 0 < self.val_split < 1:
      raise DataError(
        f"val_split={self.val_split!r} of the data config must be a fraction between 0 and 1, "
        "or None for no validation part."
      )

  @classmethod
  def of(cls, config: Mapping[str, Any]) -> "DataConfig":
    """From a ConfigDict or a dict.

    Raises:
      DataError: A key is missing or unknown, or a value is out of range.
    """
    fields = dataclasses.fields(cls)
    known = [f.name for f in fields]
    unknown = sorted(set(config) - set(known))
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in config]
    if unknown or missing:
      wrong = [f"unknown: {', '.join(unknown)}"] if unknown else []
      wrong += [f"missing: {', '.join(missing)}"] if missing else []
      raise DataError(f"Data config, {'; '.join(wrong)}. Known keys: {', '.join(known)}.")
    return cls(**{key: config[key] for key in known if key in config})


class CropSampler:
  """Seeded crops of a data set. Batch `step` is a function of (files, config, seed, step) only.

  Crop i of the endless series of crops belongs to batch i // batchsize. Its picture is that at
  place i // patches_per_image of the series of epochs, each a permutation of the pictures drawn
  from (seed, epoch); its place in the picture is drawn from (seed, i). Nothing depends on what was
  drawn before, on threads or on the cache, so a run resumes at any step by asking for that step.

  Pictures that cannot be used are named in the log and in `skipped`: those with a broken header or
  smaller than a crop at once, those whose pixels turn out broken, or whose file vanishes, when they
  are first needed; the epoch's next good picture takes their place. Safe to use from many threads.

  Attributes:
    name: The data set's label.
    skipped: Name -> reason, of the pictures not used, so far.
  """

  def __init__(self, config: Mapping[str, Any], seed: int, split: str = "train"):
    """Reads all headers, but no pixels.

    Args:
      config: What `DataConfig` describes.
      seed: Any integer.
      split: "train" or "val": the part of the files, where the config has a `val_split`; without
        one, all files.

    Raises:
      DataError: As `resolve`, or the config is wrong, or no picture can be used.
    """
    self.config = DataConfig.of(config)
    self.skipped: dict[str, str] = {}
    self.name, sources = _resolve(self.config.dataset)
    self._seed = seed
    self._sources, self._sizes = self._usable(_split(sources, self.config, split))
    self._bad: set[int] = set()
    self._lock = threading.Lock()  # Guards _bad, skipped and _cache_left; no file is read under it.
    self._cache: dict[int, np.ndarray] = {}
    self._cache_left = self.config.cache_mb << 20
    self._promised: set[int] = set()
    self._pool = concurrent.futures.ThreadPoolExecutor(_num_cpus(), "decode")
    self._permutation = functools.lru_cache(maxsize=4)(self._make_permutation)
    log.info(
      "%s (%s): %d pictures, %d skipped", self.name, split, len(self._sources), len(self.skipped)
    )

  @property
  def names(self) -> list[str]:
    """The names of the pictures that are used."""
    return [s.name for i, s in enumerate(self._sources) if i not in self._bad]

  def batch(self, step: int, rows: Optional[tuple[int, int]] = None) -> np.ndarray:
    """Batch `step` (0, 1, ...) of the endless training series, uint8 [B,patchsize,patchsize,3].

    Args:
      step: Which batch.
      rows: (first, number): only these of its crops; None for all.

    Raises:
      DataError: No picture is left that can be read; the message says why.
    """
    first, number = rows or (0, self.config.batchsize)
    first += int(step) * self.config.batchsize
    return self._assemble(first, number, self._seed, _Stream.TRAIN, self._permutation)

  @property
  def num_val_batches(self) -> int:
    """As many batches as show each picture patches_per_image times at least."""
    return -(-len(self._sources) * self.config.patches_per_image // self.config.batchsize)

  def val_batch(self, step: int) -> np.ndarray:
    """Batch `step` of `num_val_batches`, uint8 [B,patchsize,patchsize,3]; the seed has no part.

    The pictures come in order. All batches are full: the last is filled up with other crops of the
    first pictures.
    """
    in_order = np.arange(len(self._sources))
    batchsize = self.config.batchsize
    return self._assemble(int(step) * batchsize, batchsize, 0, _Stream.VAL, lambda epoch: in_order)

  def _usable(
    self, sources: Sequence[ImageSource]
  ) -> tuple[list[ImageSource], list[tuple[int, int]]]:
    usable, sizes, small = [], [], []
    for source, (size, reason) in zip(sources, _parallel(_try_size, sources)):
      if size is None:
        self._skip(source, reason)
      elif min(size) < self.config.patchsize:
        rows, columns = size
        self.skipped[source.name] = (
          f"{columns}x{rows} pixels, smaller than the patch ({self.config.patchsize})"
        )
        small.append(source.name)
      else:
        usable.append(source)
        sizes.append(size)
    if small:
      log.warning(
        "Skipped %d pictures of %s that are smaller than the patch (%d): %s%s",
        len(small), self.name, self.config.patchsize, ", ".join(small[:5]),
        ", ..." if len(small) > 5 else "",
      )  # fmt: skip
    if not usable:
      raise self._none_left()
    return usable, sizes

  def _skip(self, source: ImageSource, reason: str) -> None:
    self.skipped[source.name] = reason
    log.warning("Skipped %s of %s: %s", source.name, self.name, reason)

  def _none_left(self) -> DataError:
    name, reason = list(self.skipped.items())[-1]
    return DataError(
      f"No picture of {self.name!r} can be used; {len(self.skipped)} were skipped, "
      f"the last is {name}: {reason}"
    )

  def _make_permutation(self, epoch: int) -> np.ndarray:
    words = _random_words(self._seed, _Stream.EPOCH, epoch << 64, len(self._sources))
    return np.argsort(words, kind="stable")

  def _assemble(
    self,
    first: int,
    batchsize: int,
    seed: int,
    stream: "_Stream",
    order: Callable[[int], np.ndarray],
  ) -> np.ndarray:
    """`batchsize` crops of the series, from crop `first` on."""
    side = self.config.patchsize
    words = _random_words(seed, stream, first, 4 * batchsize).reshape(batchsize, 4)
    batch = np.empty((batchsize, side, side, 3), np.uint8)

    def fill(visit: int, slots: slice) -> None:
      epoch, position = divmod(visit, len(self._sources))
      self._fill(batch[slots], words[slots], order(epoch), position)

    # One job a picture: its consecutive crops share the decoding.
    waiting = []
    start = 0
    while start < batchsize:
      visit = (first + start) // self.config.patches_per_image
      end = min(batchsize, (visit + 1) * self.config.patches_per_image - first)
      epoch, position = divmod(visit, len(self._sources))
      if order(epoch)[position] in self._cache:
        fill(visit, slice(start, end))
      else:
        waiting.append((visit, slice(start, end)))
      start = end
    if len(waiting) == 1:
      fill(*waiting[0])
    elif waiting:
      list(self._pool.map(fill, *zip(*waiting)))
    return batch

  def _fill(self, out: np.ndarray, words: np.ndarray, order: np.ndarray, position: int) -> None:
    """Writes crops of the next good picture from `position` on into `out` [n,side,side,3]."""
    for place in range(position, position + len(order)):
      index = int(order[place % len(order)])
      if index in self._bad:
        continue
      try:
        self._crop(out, words, index)
        return
      except Exception as e:
        if not _is_broken(e):
          raise
        with self._lock:
          if index not in self._bad:
            self._bad.add(index)
            if index in self._promised:
              rows, columns = self._sizes[index]
              self._cache_left += rows * columns * 3
            self._skip(self._sources[index], _reason(e))
    raise self._none_left()

  def _crop(self, out: np.ndarray, words: np.ndarray, index: int) -> None:
    side = self.config.patchsize
    rows, columns = self._sizes[index]
    places = [(int(w[0]) % (rows - side + 1), int(w[1]) % (columns - side + 1)) for w in words]
    image = self._cache.get(index)
    if image is None:
      keep = self._promise(index)
      source = self._sources[index]
      if not keep and len(places) == 1:
        crop = source.load_crop(*places[0], side)
        out[0] = crop[:, ::-1] if self._flipped(words[0]) else crop
        return
      image = source.load()
      if image.shape != (rows, columns, 3):
        raise DataError("the picture was replaced by one of another size")
      if keep:
        self._cache[index] = image
    for i, (top, left) in enumerate(places):
      crop = image[top : top + side, left : left + side]
      out[i] = crop[:, ::-1] if self._flipped(words[i]) else crop

  def _flipped(self, words: np.ndarray) -> bool:
    return self.config.flip and int(words[2]) >= 1 << 63

  def _promise(self, index: int) -> bool:
    """Sets memory aside for a picture; False where it is spent or another thread decodes it."""
    rows, columns = self._sizes[index]
    with self._lock:
      if index in self._promised or rows * columns * 3 > self._cache_left:
        return False
      self._promised.add(index)
      self._cache_left -= rows * columns * 3
      return True


class _Stream(enum.IntEnum):
  """Independent series of random words under one seed."""

  TRAIN = 1
  VAL = 2
  EPOCH = 3
  SPLIT = 4


def _random_words(seed: int, stream: _Stream, start: int, count: int) -> np.ndarray:
  """`count` words from the series' block `start` on (a block is four words), uint64 [count].

  Of a counter-based generator (Philox 4x64), whose words never change with NumPy's version.
  """
  key = (seed % 2**64) | int(stream) << 64
  return np.random.Philox(key=key, counter=start).random_raw(count)


def _split(sources: Sequence[ImageSource], config: DataConfig, split: str) -> list[ImageSource]:
  """The training or the validation part of a data set's files, in their order."""
  if split not in ("train", "val"):
    raise DataError(f"Unknown split {split!r}. Known: train, val.")
  sources = list(sources[: config.max_images])
  if config.val_split is None:
    return sources
  if len(sources) < 2:
    raise DataError(
      f"val_split={config.val_split!r} needs 2 files or more, {config.dataset!r} has "
      f"{len(sources)} (max_images={config.max_images!r})."
    )
  order = np.argsort(_random_words(config.val_split_seed, _Stream.SPLIT, 0, len(sources)))
  num_val = min(max(1, round(config.val_split * len(sources))), len(sources) - 1)
  held_out = set(order[:num_val].tolist())
  return [s for i, s in enumerate(sources) if (i in held_out) == (split == "val")]


def _num_cpus() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


class _Calls:
  """Counts the calls that tf.data's threads make into Python, to end the interpreter after them.

  A pipeline works ahead of its consumer. Were such a call under way when the interpreter shuts
  down, its thread would never return, and TensorFlow would wait for it forever. The calls stop by
  themselves when the pipeline's buffers are full; `end` fills these with empty batches.
  """

  def __init__(self) -> None:
    self.ending = False
    self._running = 0
    self._last = 0.0
    self._lock = threading.Lock()

  def __enter__(self) -> None:
    with self._lock:
      self._running += 1

  def __exit__(self, *unused: object) -> None:
    with self._lock:
      self._running -= 1
      self._last = time.monotonic()

  def end(self) -> None:
    """Waits until no call was made for a moment; ten seconds at most."""
    self.ending = True
    deadline = time.monotonic() + 10
    while self._last and time.monotonic() < deadline:
      with self._lock:
        if not self._running and time.monotonic() - self._last > 0.3:
          return
      time.sleep(0.02)


_calls = _Calls()
atexit.register(_calls.end)


def make_train_dataset(
  config: Mapping[str, Any],
  seed: int,
  start_step: int = 0,
  num_steps: Optional[int] = None,
  split: str = "train",
) -> "tf.data.Dataset":
  """Batches of seeded crops for training, uint8 [B,patchsize,patchsize,3].

  Element k is batch `start_step + k` of `CropSampler`: a run resumed at step n asks for
  `start_step=n` and gets what the unbroken run got.

  Args:
    config: What `DataConfig` describes.
    seed: Any integer; another seed gives another order and other crops.
    start_step: The first batch.
    num_steps: How many batches; None for no end.
    split: "train" or "val", see `CropSampler`.

  Raises:
    DataError: As `CropSampler`. While iterating, it arrives as a `tf.errors.OpError` whose message
      holds it.
  """
  return to_tf_dataset(CropSampler(config, seed, split), start_step, num_steps)


def make_val_dataset(config: Mapping[str, Any]) -> "tf.data.Dataset":
  """The same batches of crops at every call, uint8 [B,patchsize,patchsize,3]; see `val_batch`.

  Args:
    config: What `DataConfig` describes. With a `val_split`, the part that training leaves out.

  Raises:
    DataError: As `make_train_dataset`.
  """
  sampler = CropSampler(config, 0, "val")
  size = (sampler.config.batchsize, sampler.config.patchsize)
  return _to_tf(sampler.val_batch, size, 0, sampler.num_val_batches)


def to_tf_dataset(
  sampler: CropSampler,
  start_step: int = 0,
  num_steps: Optional[int] = None,
  rows: Optional[tuple[int, int]] = None,
) -> "tf.data.Dataset":
  """`make_train_dataset` of a sampler that the caller keeps, for its `skipped` and `names`.

  `rows`: (first, number) of the rows wanted of each batch; None for all.
  """
  stop = np.iinfo(np.int64).max if num_steps is None else start_step + num_steps
  number = sampler.config.batchsize if rows is None else rows[1]
  batch = functools.partial(sampler.batch, rows=rows)
  return _to_tf(batch, (number, sampler.config.patchsize), start_step, stop)


def _to_tf(
  batch: Callable[[int], np.ndarray], size: tuple[int, int], start: int, stop: int
) -> "tf.data.Dataset":
  """`size`: (crops in a batch, side of a crop)."""
  import tensorflow as tf

  shape = (size[0], size[1], size[1], 3)

  def make(step: np.ndarray) -> np.ndarray:
    with _calls:
      return np.zeros(shape, np.uint8) if _calls.ending else batch(int(step))

  def load(step: "tf.Tensor") -> "tf.Tensor":
    crops = tf.numpy_function(make, [step], tf.uint8)
    crops.set_shape(shape)
    return crops

  # Few batches at once: the pictures of each are decoded by the sampler's own threads.
  num_parallel = max(2, min(8, _num_cpus() // 4))
  steps = tf.data.Dataset.range(start, stop)
  return steps.map(load, num_parallel_calls=num_parallel, deterministic=True).prefetch(2)


def _fetch(names: Sequence[str]) -> int:
  from common import fetch

  def unpack_pictures(archive: pathlib.Path) -> pathlib.Path:
    return unpack.unpacked(archive, _is_picture)

  for name in names:
    folder = pathlib.Path(configs.DATASETS.get(name, configs.DATA_DIR / name)).expanduser()
    if datasets.is_glob(str(folder)):
      print(f"Error: DATASETS[{name!r}] is a glob; fetch needs a folder.", file=sys.stderr)
      return 2
    try:
      fetch.fetch_dataset(name, configs.DOWNLOADS, folder, unpack_pictures)
      print(f"{name}: {len(_from_path(folder))} pictures in {folder}")
      for file, digest in configs.DOWNLOADS[name]["files"].items():
        path = folder.with_name(f"{folder.name}-downloads") / file
        if digest is None and path.is_file():
          print(f"  not compared with a known hash: {file}, SHA-256 {fetch.sha256_of(path)}")
    except (fetch.FetchError, DataError, unpack.ArchiveError, OSError) as e:
      print(f"Error: {e}", file=sys.stderr)
      return 1
  return 0


def main(argv: Sequence[str]) -> int:
  """`python -m common.data list`, `check DATASET...` or `fetch NAME...`; returns the exit code.

  `fetch` downloads what DOWNLOADS in configs.py names to where DATASETS says (else to a folder of
  that name in DATA_DIR). `check` opens each picture's header; `check --pixels` decodes all.
  """
  if "--help" in argv or "-h" in argv:
    print(main.__doc__)
    return 0
  if list(argv) == ["list"]:
    for name in datasets.known():
      where = configs.DATASETS.get(name, "built in")
      missing = where != "built in" and not pathlib.Path(where).expanduser().exists()
      print(f"{name:16s} {where}{'  (not on this machine)' if missing else ''}")
    return 0
  if len(argv) >= 2 and argv[0] == "fetch":
    return _fetch(argv[1:])
  if len(argv) >= 2 and argv[0] == "check":
    pixels = "--pixels" in argv
    try:
      for name in argv[1:]:
        if name == "--pixels":
          continue
        images = load_eval_images(name)
        count = sum(1 for _ in images) if pixels else len(images)
        print(f"{name}: {count} pictures, label {datasets.label(name)}")
        for broken, reason in images.skipped.items():
          print(f"  broken: {broken}: {reason}")
    except DataError as e:
      print(f"Error: {e}", file=sys.stderr)
      return 2
    return 0
  print(main.__doc__, file=sys.stderr)
  return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
