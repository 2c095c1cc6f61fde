"""The results' schema: one JSON file a run, data set, mode and step; records of each image.

    <results_dir>/<dataset>/<mode>/<family>-<runname>-step=<n>-xid=<xid>-wid=<wid>.json

Facts are read from the file's content, never back out of its name. Beside it lies, while it is
being made, the records so far (`Partial`), as `.partial`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional, Union

import configs
from common import hyper, runs

SCHEMA_VERSION = 1

# How the rate was got: files that were measured, likelihoods, optimised latents in files.
MODES = ("bitstream", "estimated", "itinf", "vbq")


class ResultError(ValueError):
  """A results file is missing, damaged or of another version."""


@dataclasses.dataclass(frozen=True)
class EvalRecord:
  """One image's measurements.

  Attributes:
    image: File name of the image.
    num_pixels: Height x width.
    num_bytes: Bytes of the whole compressed file; None where only the estimate was made.
    bpp: 8 * num_bytes / num_pixels, or the estimate where there is no file. Bits per pixel.
    bpp_estimated: Negative log2 likelihood a pixel; None for codecs without one.
    psnr_db: Peak signal-to-noise ratio of uint8 images, peak 255. `math.inf` is stored as None.
    msssim: Multi-scale structural similarity in 0..1.
    msssim_scales: How many scales it was computed with (5 unless the image is small).
    lpips: LPIPS (AlexNet, 0.1), or None where it was not computed.
    mse: Mean squared error on the 0..255 scale.
    seconds_encode: Wall time from uint8 pixels to bytes.
    seconds_decode: Wall time from bytes to uint8 pixels.
  """

  image: str
  num_pixels: int
  num_bytes: Optional[int]
  bpp: float
  bpp_estimated: Optional[float]
  psnr_db: Optional[float]
  msssim: Optional[float]
  msssim_scales: Optional[int]
  lpips: Optional[float]
  mse: float
  seconds_encode: Optional[float]
  seconds_decode: Optional[float]


@dataclasses.dataclass(frozen=True)
class ResultFile:
  """One run measured on one data set.

  Attributes:
    run: family, xid, wid, runname, commit, dirty, workdir; `label` names the curve it lies on,
      `device` is what ran it; of trained models `fingerprint` and `num_parameters`, of published
      ones `training` (minutes, machine).
      Where one run gives curves of its own (several rates, several methods), `curve` tells them
      apart, and each point has its own runname.
    config: The run's whole config (a classical codec's settings).
    overrides: What its sweep and command line changed.
    step: Training step of the weights; 0 for codecs that are not trained.
    dataset: name, images (file names in order) and hash (SHA-256 over the pictures' pixels).
    mode: One of MODES.
    records: One a picture.
    profile: What the model costs, where it was asked for (`--profile`); else None. See below.

  Fields of `profile` (made by `common.profiling.profile_codec`; FLOPs are 2 a multiply-add, seconds
  are medians over `repeats` for one picture, in float32):
    image: File name of the picture.
    size: [height, width] of the picture.
    num_bytes: Of its file.
    device: What ran it.
    repeats: How often each part was timed.
    matmul_gflops: GFLOP/s of a large matrix product in the same run: the ceiling.
    matmul_gflops_range: [least, most] over the repeats; far apart if the machine was busy.
    stages: By the codec's names ("f" analysis, "f_h", "g" synthesis, "g_h", ...):
      flops_per_pixel: For each pixel of the image, biases and GDN's divisions counted as published
        tables do.
      flops_per_pixel_products: The multiply-adds alone.
      num_parameters: Trained scalars.
      seconds: Of one call, at the padded picture's size.
      share: `seconds` over the sum of all stages', 0..1.
      gflops: GFLOP/s of the multiply-adds.
    seconds: Between pixels and bytes: infer, pack and, for both, compress; unpack (with a
      hyperprior's synthesis), synthesize, to_image (rounding to uint8) and, for all, decompress.
    decoder_flops_per_pixel: Sum of `flops_per_pixel` over the stages named "g...".
  """

  run: dict[str, Any]
  config: dict[str, Any]
  overrides: dict[str, Any]
  step: int
  dataset: dict[str, Any]
  mode: str
  records: tuple[EvalRecord, ...]
  profile: Optional[dict[str, Any]] = None
  schema_version: int = SCHEMA_VERSION

  def mean(self, field: str) -> Optional[float]:
    """Mean over images of a record's field (infinite PSNR left out); None where none has it."""
    values = [getattr(r, field) for r in self.records]
    known = [v for v in values if v is not None and math.isfinite(v)]
    return sum(known) / len(known) if known else None


def result_path(
  results_dir: runs.PathLike, dataset: str, mode: str, run: dict[str, Any], step: int
) -> pathlib.Path:
  """Where a run's results on a data set lie."""
  if mode not in MODES:
    raise ResultError(f"Unknown mode {mode!r}. Known: {', '.join(MODES)}.")
  runname = hyper.safe_name(str(run["runname"]))
  name = f"{run['family']}-{runname}-step={step}-xid={run['xid']}-wid={run['wid']}.json"
  return pathlib.Path(results_dir) / hyper.safe_name(dataset) / mode / name


def pictures_dir(results_dir: runs.PathLike, result: ResultFile) -> pathlib.Path:
  """Where a report looks for a run's decoded pictures: beside its results file, without `.json`.

  Evaluation writes them there with `--save_dir`; a picture is called as in the data set, with
  `.png`.
  """
  name = result.dataset["name"]
  return result_path(results_dir, name, result.mode, result.run, result.step).with_suffix("")


def as_dict(record: EvalRecord) -> dict[str, Any]:
  """A record's fields by name."""
  return dataclasses.asdict(record)


def write(results_dir: runs.PathLike, result: ResultFile) -> pathlib.Path:
  """Writes a results file whole; returns its path.

  Raises:
    ResultError: The disk is full, or cannot be written.
  """
  path = result_path(results_dir, result.dataset["name"], result.mode, result.run, result.step)
  try:
    runs.write_json(path, dataclasses.asdict(result))
  except OSError as e:
    raise ResultError(
      f"{path} cannot be written ({e.strerror or e}). Make room or permit it, and start the "
      "command again, or name another folder (--results_dir, or RESULTS_DIR in configs.py)."
    ) from e
  return path


def read(path: runs.PathLike) -> ResultFile:
  """Reads a results file.

  Raises:
    ResultError: It is damaged, or of a schema version that this code does not read.
  """
  try:
    record = runs.read_json(path)
    version = record["schema_version"]
    if version != SCHEMA_VERSION:
      raise ResultError(
        f"{path}: schema version {version!r}; this code reads {SCHEMA_VERSION}. Evaluate anew."
      )
    record["records"] = tuple(EvalRecord(**r) for r in record["records"])
    return ResultFile(**record)
  except ResultError:
    raise
  except (runs.RunError, KeyError, TypeError) as e:
    raise ResultError(f"{path} is not a results file ({e}).") from e


class Partial:
  """The records of an evaluation that is under way, on the disk as soon as they are measured.

  JSON lines beside the results file: what it is of; then records, and who began or went on. One
  process at a time holds it, by a lock on the file itself. Used as a context; what is in it stays
  there until `remove`.

  Attributes:
    path: The file.
    records: By image name; those of an earlier process first.
  """

  def __init__(self, result: runs.PathLike, of: Mapping[str, Any], anew: bool = False):
    """Opens the file, and reads what an evaluation that ended early left in it.

    Args:
      result: The path of the results file.
      of: All that the records depend on, as JSON; records of anything else are dropped.
      anew: Whether to drop the records that are there.

    Raises:
      ResultError: Another process is at it; or the file cannot be written.
    """
    self.path = pathlib.Path(result).with_suffix(".partial")
    self.records: dict[str, EvalRecord] = {}
    depends_on = json.loads(json.dumps({**of, "schema_version": SCHEMA_VERSION}))
    with self._explained("nothing was measured yet"):
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self._file = self._locked()
      try:
        self._begin(depends_on, anew)
      except BaseException:
        self._file.close()
        raise

  def _locked(self) -> Any:
    while True:
      f = self.path.open("ab+", buffering=0)
      if not runs.try_lock(f, self.path):
        f.seek(0)
        holders = [r["process"] for r in _lines(f.read())[0] if "process" in r]
        f.close()
        raise ResultError(
          f"{self.path.with_suffix('.json')} is being made by "
          f"{holders[-1] if holders else 'another process'}. Wait for it or stop it."
        )
      # Between opening and locking, the process before may have ended and removed the file.
      with contextlib.suppress(FileNotFoundError):
        if self.path.stat().st_ino == os.fstat(f.fileno()).st_ino:
          return f
      f.close()

  def _begin(self, of: dict[str, Any], anew: bool) -> None:
    self._file.seek(0)
    lines, whole = _lines(self._file.read())
    if not anew and lines and lines[0] == of:
      with contextlib.suppress(TypeError):
        for line in lines[1:]:
          if "process" not in line:
            record = EvalRecord(**line)
            self.records[record.image] = record
      self._file.truncate(whole)  # What a kill tore off.
    else:
      self._file.truncate(0)
      self._write(of)
    self._write({"process": runs.this_process()})

  def append(self, record: EvalRecord) -> None:
    """Writes one record, whole or not at all.

    Raises:
      ResultError: The disk is full, or cannot be written any more.
    """
    with self._explained(f"{len(self.records)} records are kept"):
      self._write(as_dict(record))
    self.records[record.image] = record

  def _write(self, line: Mapping[str, Any]) -> None:
    end = self._file.seek(0, os.SEEK_END)
    content = runs.json_line(line).encode()
    try:
      while content:
        content = content[self._file.write(content) :]
    except BaseException:
      self._file.truncate(end)
      raise

  @contextlib.contextmanager
  def _explained(self, kept: str) -> Any:
    try:
      yield
    except OSError as e:
      raise ResultError(
        f"{self.path} cannot be written ({e.strerror or e}); {kept}. Make room or permit it, or "
        "name another folder (--results_dir)."
      ) from e

  def remove(self) -> None:
    """The results file is written: its records need no other."""
    with contextlib.suppress(FileNotFoundError):
      self.path.unlink()

  def __enter__(self) -> "Partial":
    return self

  def __exit__(self, *unused: object) -> None:
    self._file.close()


def _lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
  """The JSON objects of whole lines up to the first that is none, and the bytes they take."""
  found, end = [], 0
  for line in content.splitlines(keepends=True):
    try:
      value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
      value = None
    if not isinstance(value, dict):
      break
    found.append(value)
    end += len(line)
  return found, end


@functools.cache
def code_hash(*packages: str) -> str:
  """SHA-256 (hex) of the project's Python sources in these folders: records depend on them."""
  whole = hashlib.sha256()
  for package in sorted(packages):
    folder = configs.PROJECT_DIR / package
    for path in sorted(folder.glob("*.py")):
      whole.update(f"{package}/{path.name}\0".encode() + path.read_bytes() + b"\0")
  return whole.hexdigest()


# What published results call the folders of experiments, wherever this site has them.
_EXPERIMENTS = {"train_xms": configs.TRAIN_DIR, "itinf_xms": configs.ITINF_DIR}


def portable(path: str) -> str:
  """A run's directory as results name it that leave this machine: `train_xms/<xid>/<run>`.

  Others end in their last two parts too, which are the experiment and the run.
  """
  for name, folder in _EXPERIMENTS.items():
    with contextlib.suppress(ValueError):
      return f"{name}/{pathlib.Path(path).relative_to(folder).as_posix()}"
  return "/".join(pathlib.PurePath(path).parts[-2:]) if path.startswith("/") else path


def located(path: str) -> pathlib.Path:
  """Where a run's directory would be on this machine, of a name that `portable` may have made."""
  first, _, rest = path.partition("/")
  return _EXPERIMENTS[first] / rest if first in _EXPERIMENTS else pathlib.Path(path)


def check_writable(path: Union[str, pathlib.Path]) -> None:
  """Tries to write beside a results file that is still to be made: before hours of work.

  Raises:
    ResultError: It cannot be written.
  """
  folder = pathlib.Path(path).parent
  probe = folder / f".{runs.unique_id()}.tmp"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    try:
      probe.write_bytes(bytes(1 << 16))
    finally:
      probe.unlink(missing_ok=True)
  except OSError as e:
    raise ResultError(
      f"{folder} cannot be written ({e.strerror or e}); nothing was measured yet. Make room or "
      "permit it, or name another folder (--results_dir, or RESULTS_DIR in configs.py)."
    ) from e


@dataclasses.dataclass(frozen=True)
class RDCurve:
  """A rate-distortion curve.

  Attributes:
    label: For the legend.
    bpp: Mean bits per pixel of each point, increasing.
    psnr_db: Mean PSNR of each point.
    source: Where it comes from: a results mode ("bitstream", ...) or a publication.
    group: What makes one colour: family and xid of an experiment, or a codec's name.
    msssim_db: -10 log10(1 - mean MS-SSIM) of each point, where known.
    lpips: Mean LPIPS of each point, where known.
    mse: Mean MSE of each point, 0..255, where known.
  """

  label: str
  bpp: tuple[float, ...]
  psnr_db: tuple[float, ...]
  source: str
  group: str = ""
  msssim_db: Optional[tuple[float, ...]] = None
  lpips: Optional[tuple[float, ...]] = None
  mse: Optional[tuple[float, ...]] = None


# Where a publication's rate comes from: sizes of whole files, coded streams without their
# container, likelihoods.
PUBLISHED_RATES = ("files", "streams", "estimate", "not stated")


@dataclasses.dataclass(frozen=True)
class Publication:
  """What a published curve says about itself; `json_results/README.md` describes the fields.

  Attributes:
    title: The curve's name, without its source.
    codec: Its short name.
    source: A repository or a paper.
    convention: How it was measured.
    rate: One of PUBLISHED_RATES.
    reference: Commit and files of the source, where known.
    on_request: Whether it is drawn only if it is asked for.
    decoder_flops_per_pixel: Of the model's synthesis transforms, where its source counts them.
  """

  title: str
  codec: str
  source: str
  convention: str
  rate: str = "not stated"
  reference: str = ""
  on_request: bool = False
  decoder_flops_per_pixel: Optional[float] = None


def msssim_to_db(msssim: float) -> float:
  """MS-SSIM in 0..1 as decibels: -10 log10(1 - v); 1 gives infinity."""
  return math.inf if msssim >= 1 else -10 * math.log10(1 - msssim)


def find(
  results_dir: runs.PathLike, dataset: str, modes: Sequence[str] = MODES
) -> list[pathlib.Path]:
  """The results files of a data set, in order; experiments whose name starts with `_` left out."""
  found: list[pathlib.Path] = []
  for mode in modes:
    folder = pathlib.Path(results_dir) / hyper.safe_name(dataset) / mode
    found += sorted(p for p in folder.glob("*.json") if not p.name.startswith("_"))
  return found


def curves(result_files: Iterable[ResultFile]) -> list[RDCurve]:
  """Groups results into curves: one an experiment, mode and `curve`; one point a run, by rate.

  Where a run was evaluated at several steps, its last step counts.
  """
  newest: dict[tuple[Any, ...], ResultFile] = {}
  for result in result_files:
    if str(result.run["xid"]).startswith("_"):
      continue
    key = (
      result.run["family"],
      result.run["xid"],
      result.mode,
      result.run["wid"],
      result.run["runname"],
    )
    if key not in newest or newest[key].step < result.step:
      newest[key] = result
  groups: dict[tuple[Any, ...], list[ResultFile]] = {}
  for result in newest.values():
    groups.setdefault((group_of(result.run), result.mode), []).append(result)
  return [
    _curve(key, members) for key, members in sorted(groups.items(), key=lambda kv: str(kv[0]))
  ]


def group_of(run: Mapping[str, Any]) -> str:
  """What makes one curve and one colour: family, experiment and, where there is one, `curve`."""
  curve = run.get("curve")
  return f"{run['family']}-{run['xid']}" + (f"-{curve}" if curve else "")


def _kind(run: Mapping[str, Any], label: str, mode: str) -> str:
  """What tells a curve from others of its label: its method, or where its rate comes from."""
  curve = run.get("curve")
  return curve if curve and curve not in label else mode


def _curve(key: tuple[Any, ...], members: list[ResultFile]) -> RDCurve:
  group, mode = key
  points = []
  for r in members:
    bpp, psnr = r.mean("bpp"), r.mean("psnr_db")
    if bpp is not None and psnr is not None:
      msssim, lpips = r.mean("msssim"), r.mean("lpips")
      msssim_db = None if msssim is None else msssim_to_db(msssim)
      points.append((bpp, psnr, msssim_db, lpips, r.mean("mse")))
  points.sort(key=lambda p: p[:2])
  run = members[0].run
  label = run.get("label") or f"{run['family']} {run['xid']}"
  has_msssim = all(p[2] is not None for p in points)
  has_lpips = all(p[3] is not None for p in points)
  has_mse = all(p[4] is not None for p in points)
  return RDCurve(
    label=label if mode == "bitstream" else f"{label} ({_kind(run, label, mode)})",
    bpp=tuple(p[0] for p in points),
    psnr_db=tuple(p[1] for p in points),
    source=mode,
    group=group,
    msssim_db=tuple(p[2] for p in points) if has_msssim else None,  # type: ignore[misc]
    lpips=tuple(p[3] for p in points) if has_lpips else None,  # type: ignore[misc]
    mse=tuple(p[4] for p in points) if has_mse else None,  # type: ignore[misc]
  )
