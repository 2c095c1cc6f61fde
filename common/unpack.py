"""Archives of pictures, unpacked once: .tar, .tar.gz, .tgz, .tar.bz2, .tar.xz and .zip.

An archive goes to `configs.DATA_CACHE_DIR/archives/<name>-<hash>/`, whole or not at all; the hash
is of its path, size and time, so a changed archive is unpacked anew. Of its members, pictures are
taken and all else is left out: links, devices, other files. A member whose name leads out of the
folder condemns the archive.
"""

import contextlib
import fcntl
import hashlib
import logging
import lzma
import os
import pathlib
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Callable, Union

import configs

log = logging.getLogger(__name__)

ARCHIVE_SUFFIXES = (".tar", ".tar.bz2", ".tar.gz", ".tar.xz", ".tgz", ".zip")

# A picture of more bytes than this is none that training could use, but may be a trap.
_LARGEST_MEMBER = 1 << 30


class ArchiveError(ValueError):
  """An archive cannot be used; the message says why."""


def is_archive(path: Union[str, "os.PathLike[str]"]) -> bool:
  """Whether a path's name is that of an archive."""
  return str(path).lower().endswith(ARCHIVE_SUFFIXES)


def unpacked(archive: pathlib.Path, wanted: Callable[[str], bool]) -> pathlib.Path:
  """The folder that holds an archive's members, which are unpacked if they are not there yet.

  Args:
    archive: An existing file.
    wanted: Which members to take, by the last part of their names.

  Raises:
    ArchiveError: It is damaged or truncated, holds nothing wanted, or a name leads out of it.
    OSError: There is no room, or the cache folder cannot be written.
  """
  archive = archive.resolve()
  status = archive.stat()
  facts = f"{archive}\n{status.st_size}\n{status.st_mtime_ns}"
  name = f"{archive.name[:80]}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
  folder = configs.DATA_CACHE_DIR / "archives" / name
  if not folder.is_dir():
    make_whole(folder, lambda target: _unpack(archive, target, wanted))
  return folder


def _unpack(archive: pathlib.Path, target: pathlib.Path, wanted: Callable[[str], bool]) -> None:
  from tqdm import tqdm

  count = 0
  try:
    members = _zip_members if archive.name.lower().endswith(".zip") else _tar_members
    with tqdm(unit="picture", desc=f"Unpacking {archive.name}", disable=None) as progress:
      for name, size, content in members(archive):
        inside = _inside(name)
        if not wanted(inside.name):
          continue
        if size > _LARGEST_MEMBER:
          raise ArchiveError(f"{name!r} has {size:,} bytes; {_LARGEST_MEMBER:,} is the limit")
        file = target / inside
        file.parent.mkdir(parents=True, exist_ok=True)
        with content() as source, file.open("wb") as f:
          shutil.copyfileobj(_Bounded(source, size), f)
        count += 1
        progress.update()
  except ArchiveError as e:
    raise ArchiveError(f"Archive {str(archive)!r} is refused: {e}.") from e
  except _DAMAGE as e:
    raise ArchiveError(
      f"Archive {str(archive)!r} is damaged, truncated or encrypted ({type(e).__name__}: {e}). "
      "Get it anew."
    ) from e
  if not count:
    raise ArchiveError(f"Archive {str(archive)!r} holds no picture.")
  log.info("Unpacked %d pictures of %s", count, archive)


_DAMAGE = (
  tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError,
  RuntimeError, ValueError,
)  # fmt: skip

Open = Callable[[], IO[bytes]]


def _zip_members(archive: pathlib.Path) -> Iterator[tuple[str, int, Open]]:
  with zipfile.ZipFile(archive) as file:
    for info in file.infolist():
      is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
      if not info.is_dir() and not is_link:
        yield info.filename, info.file_size, lambda info=info: file.open(info)  # type: ignore[misc]


class _StrictTarInfo(tarfile.TarInfo):
  """Takes nothing but the end mark, a block of zeros, for the end; `tarfile` takes any damage."""

  @classmethod
  def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_StrictTarInfo":
    """See `tarfile.TarInfo`."""
    try:
      return super().fromtarfile(tarfile_)
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
      raise
    except tarfile.HeaderError as e:
      raise tarfile.ReadError(f"it ends without its end mark: {e}") from e


def _tar_members(archive: pathlib.Path) -> Iterator[tuple[str, int, Open]]:
  """In their order in the file: a compressed one is read once."""
  with tarfile.open(archive, tarinfo=_StrictTarInfo) as file:
    for info in file:
      if info.isfile():
        yield info.name, info.size, lambda info=info: file.extractfile(info)  # type: ignore[misc]


def _inside(name: str) -> pathlib.PurePosixPath:
  """A member's name as a path below the folder.

  Raises:
    ArchiveError: It leads elsewhere.
  """
  path = pathlib.PurePosixPath(name.replace("\\", "/"))
  has_drive = path.parts[:1] and path.parts[0][1:2] == ":"  # C:... of Windows.
  bad = path.is_absolute() or ".." in path.parts or not path.parts or has_drive
  if bad or "\0" in name:
    raise ArchiveError(f"the name {name!r} leads out of it")
  return path


class _Bounded:
  """Reads no more than was promised: a member that unpacks to more is refused."""

  def __init__(self, source: IO[bytes], size: int):
    self._source, self._left = source, size

  def read(self, count: int = -1) -> bytes:
    """See `io.RawIOBase.read`."""
    data = self._source.read(count)
    self._left -= len(data)
    if self._left < 0:
      raise ArchiveError("a member is larger than the archive's table says")
    if not data and self._left:
      raise ArchiveError("a member is smaller than the archive's table says")
    return data


def make_whole(folder: pathlib.Path, make: Callable[[pathlib.Path], None]) -> None:
  """Makes `folder` whole or not at all; of several processes at once, one works and others wait."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  with (folder.parent / f".{folder.name}.lock").open("a") as lock:
    alone = False
    with contextlib.suppress(OSError):  # Some network file systems have no locks.
      fcntl.flock(lock, fcntl.LOCK_EX)
      alone = True
    if folder.is_dir():
      return
    if alone:  # Then these are leftovers of killed processes.
      for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    log.info("Making %s", folder)
    temporary = pathlib.Path(
      tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp")
    )
    try:
      make(temporary)
      umask = os.umask(0)
      os.umask(umask)
      temporary.chmod(0o777 & ~umask)
      try:
        temporary.rename(folder)
      except OSError:
        if not folder.is_dir():  # Else another process made it just now.
          raise
    finally:
      shutil.rmtree(temporary, ignore_errors=True)
