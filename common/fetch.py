"""Downloads of data sets: `python -m common.data fetch kodak`. Plain Python.

A download goes on where it was cut off, is compared with its SHA-256 where one is known, and is put
in its place only when it is whole.
"""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional

_CHUNK = 1 << 18
_SECONDS = 60.0


class FetchError(RuntimeError):
  """A download failed; what was received so far is kept, and the next try goes on from there."""


@dataclasses.dataclass(frozen=True)
class Download:
  """One file of a data set.

  Attributes:
    url: Where it is.
    name: What it is called in the data set's folder.
    sha256: Hex digest of its bytes; None where nobody has published one.
  """

  url: str
  name: str
  sha256: Optional[str] = None


def fetch(downloads: Sequence[Download], folder: pathlib.Path) -> list[pathlib.Path]:
  """Brings files into a folder; those that are there already, with the right hash, stay.

  Returns their paths.

  Raises:
    FetchError: One could not be had, or has another hash; the message says what to do.
    OSError: The folder cannot be written, or is full.
  """
  from tqdm import tqdm

  folder.mkdir(parents=True, exist_ok=True)
  files = []
  for number, download in enumerate(downloads, start=1):
    target = folder / download.name
    if not (target.is_file() and _holds(target, download.sha256)):
      label = (
        f"{download.name} ({number}/{len(downloads)})" if len(downloads) > 1 else download.name
      )
      with tqdm(unit="B", unit_scale=True, desc=label, disable=None) as progress:
        _fetch_one(download, target, progress)
    files.append(target)
  return files


def sha256_of(path: pathlib.Path) -> str:
  """The hex digest of a file."""
  digest = hashlib.sha256()
  with path.open("rb") as f:
    while chunk := f.read(_CHUNK):
      digest.update(chunk)
  return digest.hexdigest()


def _holds(path: pathlib.Path, sha256: Optional[str]) -> bool:
  return sha256 is None or sha256_of(path) == sha256


def _fetch_one(download: Download, target: pathlib.Path, progress: Any) -> None:
  part = target.with_name(f".{target.name}.part")
  try:
    _receive(download.url, part, progress)
  except (urllib.error.URLError, ConnectionError, TimeoutError) as e:
    have = part.stat().st_size if part.exists() else 0
    raise FetchError(
      f"{download.url} could not be downloaded ({e}). {have:,} bytes are kept; the same command "
      f"goes on from there. Or put the file at {target} yourself."
    ) from e
  found = sha256_of(part)
  if download.sha256 is not None and found != download.sha256:
    part.unlink()
    raise FetchError(
      f"{download.url} is not the file it should be: its SHA-256 is {found}, not "
      f"{download.sha256}. It was thrown away; try again, or look at the address in a browser."
    )
  part.replace(target)


def _receive(url: str, part: pathlib.Path, progress: Any) -> None:
  """Appends to `part` what is missing of it."""
  have = part.stat().st_size if part.exists() else 0
  request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
  try:
    response = urllib.request.urlopen(request, timeout=_SECONDS)
  except urllib.error.HTTPError as e:
    if e.code != 416 or not have:  # 416: there is nothing after what we have.
      raise
    e.close()
    return
  with response:
    goes_on = response.status == 206
    if have and not goes_on:  # The server sends the whole file again.
      have = 0
    length = response.headers.get("Content-Length")
    total = have + int(length) if length is not None else None
    progress.reset(total)
    progress.update(have)
    with part.open("ab" if goes_on else "wb") as f:
      while chunk := response.read(_CHUNK):
        f.write(chunk)
        progress.update(len(chunk))
      f.flush()
      os.fsync(f.fileno())
  if total is not None and part.stat().st_size < total:
    raise ConnectionError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")


def fetch_dataset(
  name: str,
  known: Mapping[str, Mapping[str, Any]],
  folder: pathlib.Path,
  unpack: Callable[[pathlib.Path], pathlib.Path],
) -> pathlib.Path:
  """Brings a known data set to a folder.

  Args:
    name: A key of `known`.
    known: `configs.DOWNLOADS`: for each name a base address `url` and its `files`, name -> SHA-256
      (or None); an archive among them is unpacked.
    folder: Where it goes.
    unpack: Unpacks an archive, and returns the folder with its pictures.

  Raises:
    FetchError: As `fetch`, or the name is unknown.
  """
  if name not in known:
    raise FetchError(
      f"It is not known where to get {name!r}. Known: {', '.join(sorted(known))} (DOWNLOADS in "
      "configs.py); any other set: download it, and add its folder to DATASETS."
    )
  entry = known[name]
  base = str(entry["url"]).rstrip("/")
  downloads = [Download(f"{base}/{file}", file, digest) for file, digest in entry["files"].items()]
  archives = [d for d in downloads if d.name.lower().endswith((".zip", ".tar", ".tgz", ".gz"))]
  if not archives:
    fetch(downloads, folder)
    return folder
  for archive in fetch(archives, folder.with_name(f"{folder.name}-downloads")):
    shutil.copytree(unpack(archive), folder, dirs_exist_ok=True)
  return folder
