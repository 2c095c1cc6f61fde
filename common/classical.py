"""Classical codecs on the pictures of a data set: real files, the same records as learned codecs.

    python -m common.classical --dataset sample --codec jpeg,webp
    python -m common.classical --dataset kodak --codec jpeg444 --qualities 10,50,90 --jobs 4
    python -m common.classical --dataset kodak --codec jpeg2000,avif,jxl,jpegli,mozjpeg,bpg,vtm

A codec is one row of `CODECS`. Every quality becomes one results file (wid = quality), so reports
show a codec as a curve. Pictures go through several threads (`--jobs`); mozjpeg has a lock, so of
its files one is made at a time, and with more than one job its seconds include the wait.

Mean errors of R, G and B tell whether a format's colour conversion truncates where it should round.
On kodim23 at quality 90 they are under 0.1 levels for JPEG (all encoders) and JPEG 2000, under 0.2
for WebP and JPEG XL, and at most 0.3 for AVIF 4:4:4; but AVIF 4:2:0, as Pillow converts it, has
-0.44, +0.51 and -0.42. So `avif` is 4:4:4, and `avif420` is there for its low rates.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional, Protocol

import numpy as np
import tqdm
from absl import flags as absl_flags
from PIL import Image, features

import configs
from common import bitstream, data, flags, libjpeg, metrics, programs, results, runs

if TYPE_CHECKING:
  from common.codec import Codec
else:
  Codec = object  # common.codec imports TensorFlow, which nothing here needs.

USAGE = """
python -m common.classical --dataset NAME [--codec jpeg,webp] [--qualities 10,50,90]

Compresses the pictures of a data set with classical codecs, decodes the files again, and writes
one results file a quality: <results_dir>/<dataset>/bitstream/classical-quality=<q>-....json
"""

FAMILY = "classical"

# As JPEG: from about 0.2 to 3 bits per pixel.
QUALITIES = (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 95)


class ClassicalError(ValueError):
  """A codec is unknown, missing here, or cannot do what it is asked; the message names the fix."""


class Images(Protocol):
  """What is needed of `data.EvalImages`."""

  @property
  def name(self) -> str:
    """The data set's name."""

  @property
  def hash(self) -> str:
    """SHA-256 over the pictures."""

  def __len__(self) -> int:
    """How many pictures there are."""

  def __getitem__(self, index: int) -> tuple[str, np.ndarray]:
    """(name, picture uint8 [H, W, 3])."""


class PillowCodec(Codec):
  """A format that Pillow writes and reads. The files hold pixels only: no profile, no EXIF.

  Args:
    file_format: Pillow's name of the format, "JPEG".
    options: For `PIL.Image.Image.save`.
    max_side: The longest side in pixels that the format can hold.
  """

  def __init__(self, file_format: str, options: Mapping[str, Any], max_side: int):
    self.file_format = file_format
    self.options = dict(options)
    self.max_side = max_side

  def compress(self, image: np.ndarray) -> bytes:
    """See `codec.Codec.compress`.

    Raises:
      ClassicalError: The picture is larger than the format can hold.
    """
    if max(image.shape[:2]) > self.max_side:
      raise ClassicalError(
        f"{self.file_format} holds at most {self.max_side} pixels a side; the picture has "
        f"{image.shape[1]}x{image.shape[0]}."
      )
    return self.encode(image)

  def encode(self, image: np.ndarray) -> bytes:
    """`compress` without a check."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, self.file_format, **self.options)
    return file.getvalue()

  def decompress(self, data: bytes) -> np.ndarray:
    """See `codec.Codec.decompress`. Damage within a picture's data may go unnoticed: these formats
    have no checksums.

    Raises:
      bitstream.BitstreamError: It is not a file of this format, or it is truncated.
    """
    try:
      with Image.open(io.BytesIO(data), formats=[self.file_format]) as image:
        return np.array(image.convert("RGB"))
    except (
      OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError,
    ) as e:  # fmt: skip
      raise bitstream.BitstreamError(f"Not a whole {self.file_format} file: {e}") from e


class EncoderCodec(PillowCodec):
  """Files of a format that Pillow reads, made by an encoder of somebody else.

  Args:
    file_format: Pillow's name of the format, "JPEG".
    encoder: From a picture, uint8 [H, W, 3], to a file.
    max_side: The longest side in pixels that the format can hold.
  """

  def __init__(self, file_format: str, encoder: Callable[[np.ndarray], bytes], max_side: int):
    super().__init__(file_format, {}, max_side)
    self._encoder = encoder

  def encode(self, image: np.ndarray) -> bytes:
    """See `PillowCodec.encode`."""
    try:
      return self._encoder(image)
    except libjpeg.LibjpegError as e:
      raise ClassicalError(str(e)) from e


@dataclasses.dataclass(frozen=True)
class Row:
  """A codec of the registry.

  Attributes:
    label: The curve's name, without versions.
    make: From a quality to the codec.
    settings: What its files depend on besides quality and versions; kept in the results.
    versions: The libraries at work, the one that names the curve first; raises ClassicalError
      where one is missing.
    qualities: The qualities measured unless others are asked for.
    lowest: The lowest quality that can be asked for.
    highest: The highest one.
  """

  label: str
  make: Callable[[int], Codec]
  settings: Mapping[str, Any]
  versions: Callable[[], dict[str, str]]
  qualities: tuple[int, ...] = QUALITIES
  lowest: int = 1
  highest: int = 100


def _pillow_versions(feature: str, library: str) -> Callable[[], dict[str, str]]:
  def versions() -> dict[str, str]:
    if not features.check(feature):
      raise ClassicalError(f"this Pillow was built without {library}")
    name, version = library, features.version(feature)
    if feature == "jpg" and features.check("libjpeg_turbo"):
      name, version = "libjpeg-turbo", features.version("libjpeg_turbo")
    return {"Pillow": Image.__version__, name: version or "unknown"}

  return versions


def _jpeg(label: str, subsampling: str, optimize: bool) -> Row:
  options = {"subsampling": subsampling, "optimize": optimize}
  return Row(
    label=label,
    make=lambda quality: PillowCodec("JPEG", {"quality": quality, **options}, max_side=65500),
    settings={"format": "JPEG", **options},
    versions=_pillow_versions("jpg", "libjpeg"),
  )


def _webp() -> Row:
  options = {"method": 4}
  return Row(
    label="WebP",
    make=lambda quality: PillowCodec("WEBP", {"quality": quality, **options}, max_side=16383),
    settings={"format": "WEBP", "subsampling": "4:2:0", **options},
    versions=_pillow_versions("webp", "libwebp"),
    lowest=0,
  )


def _jpeg2000(by_rate: bool) -> Row:
  """Irreversible wavelet and colour transform, a bare codestream.

  OpenJPEG aims at a rate or at a PSNR, the same for every picture. On Kodak means are up to 1.4 dB
  better by rate below 1 bpp, and published curves are by rate.
  """
  options = {"irreversible": True, "mct": 1, "no_jp2": True}

  def make(quality: int) -> Codec:
    if by_rate:
      target = {"quality_mode": "rates", "quality_layers": [24 / (0.03 * quality)]}
    else:
      target = {"quality_mode": "dB", "quality_layers": [22 + quality / 4]}
    return PillowCodec("JPEG2000", {**options, **target}, max_side=2**31)

  target = {"target_bpp": "0.03 q"} if by_rate else {"target_db": "22 + q / 4"}
  return Row(
    label=f"JPEG 2000 4:4:4, codestream, {'fixed rate' if by_rate else 'fixed PSNR'}",
    make=make,
    settings={"format": "JPEG2000", "subsampling": "4:4:4", **options, **target},
    versions=_pillow_versions("jpg_2000", "OpenJPEG"),
  )


def _avif(subsampling: str) -> Row:
  options = {"subsampling": subsampling, "range": "full", "speed": 6}
  return Row(
    label=f"AVIF {subsampling}, speed 6",
    make=lambda quality: PillowCodec("AVIF", {"quality": quality, **options}, max_side=65535),
    settings={"format": "AVIF", **options},
    versions=_pillow_versions("avif", "libavif"),
    lowest=0,
  )


def _package_versions(package: str, module: str, *more: str) -> Callable[[], dict[str, str]]:
  """Versions of installed packages; imports `module`, which registers its format with Pillow."""

  def versions() -> dict[str, str]:
    try:
      importlib.import_module(module)
      found = {name: importlib.metadata.version(name) for name in (package, *more)}
    except ImportError as e:  # PackageNotFoundError too.
      raise ClassicalError(f"the package {package} is not installed: pip install {package}") from e
    return {**found, "Pillow": Image.__version__}

  return versions


def _jxl() -> Row:
  options = {"effort": 7}

  def make(quality: int) -> Codec:
    importlib.import_module("pillow_jxl")  # Registers the format.
    return PillowCodec("JXL", {"quality": quality, **options}, max_side=2**30)

  return Row(
    label="JPEG XL 4:4:4, effort 7",
    make=make,
    settings={"format": "JXL", "subsampling": "4:4:4", **options},
    versions=_package_versions("pillow-jxl-plugin", "pillow_jxl"),
  )


def _jpegli() -> Row:
  def make(quality: int) -> Codec:
    pyjpegli = importlib.import_module("pyjpegli")

    def encode(image: np.ndarray) -> bytes:
      height, width = image.shape[:2]
      return bytes(pyjpegli.encode(np.ascontiguousarray(image).tobytes(), width, height, quality))

    return EncoderCodec("JPEG", encode, max_side=65500)

  return Row(
    label="jpegli 4:2:0, baseline",  # All that the package offers is a quality.
    make=make,
    settings={"format": "JPEG", "subsampling": "4:2:0", "progressive": False},
    versions=_package_versions("pyjpegli", "pyjpegli"),
  )


def _mozjpeg(subsampling: str, flat: bool) -> Row:
  def make(quality: int) -> Codec:
    tables = [np.full((8, 8), _flat_step(quality))] * 2 if flat else None

    def encode(image: np.ndarray) -> bytes:
      return libjpeg.mozjpeg(image, None if flat else quality, tables, subsampling)

    return EncoderCodec("JPEG", encode, max_side=65500)

  def versions() -> dict[str, str]:
    try:
      return {"mozjpeg": "4.0.3", "jpeglib": libjpeg.version(), "Pillow": Image.__version__}
    except libjpeg.LibjpegError as e:
      raise ClassicalError(str(e)) from e

  return Row(
    label=f"mozjpeg {subsampling}, progressive{', flat table' if flat else ''}",
    make=make,
    settings={
      "format": "JPEG", "subsampling": subsampling, "progressive": True, "trellis": True,
      "table": "flat" if flat else "mozjpeg's default",
    },
    versions=versions,
  )  # fmt: skip


def _flat_step(quality: int) -> int:
  """The level of a flat table at a quality: 16, scaled as libjpeg scales tables."""
  scale = 5000 / quality if quality < 50 else 200 - 2 * quality
  return min(max(int((16 * scale + 50) / 100), 1), 255)


class ProgramCodec(Codec):
  """A codec of `programs`.

  Args:
    encode: From a picture, uint8 [H, W, 3], to a file.
    decode: The way back.
  """

  def __init__(self, encode: Callable[[np.ndarray], bytes], decode: Callable[[bytes], np.ndarray]):
    self._encode, self._decode = encode, decode

  def compress(self, image: np.ndarray) -> bytes:
    """See `codec.Codec.compress`.

    Raises:
      ClassicalError: The program fails.
    """
    try:
      return self._encode(image)
    except programs.ProgramError as e:
      raise ClassicalError(str(e)) from e

  def decompress(self, data: bytes) -> np.ndarray:
    """See `codec.Codec.decompress`."""
    return self._decode(data)


def _program_versions(name: str, version: Callable[[], str]) -> Callable[[], dict[str, str]]:
  def versions() -> dict[str, str]:
    try:
      return {name: version()}
    except programs.ProgramError as e:
      raise ClassicalError(str(e)) from e

  return versions


def _bpg(subsampling: str) -> Row:
  def make(quality: int) -> Codec:
    qp = 51 - quality
    return ProgramCodec(
      lambda image: programs.bpg_encode(image, qp, subsampling), programs.bpg_decode
    )

  return Row(
    label=f"BPG {subsampling}",
    make=make,
    settings={"format": "BPG", "subsampling": subsampling, "qp": "51 - q"},
    versions=_program_versions("bpgenc", programs.bpg_version),
    qualities=(4, 9, 14, 19, 24, 29, 34),
    lowest=0,
    highest=51,
  )


def _vtm() -> Row:
  return Row(
    label="VTM 4:4:4, intra",
    make=lambda quality: ProgramCodec(
      lambda image: programs.vtm_encode(image, 63 - quality), programs.vtm_decode
    ),
    settings={"format": "VVC", "subsampling": "4:4:4", "matrix": "BT.709", "qp": "63 - q"},
    versions=_program_versions("VTM", programs.vtm_version),
    qualities=(16, 21, 26, 31, 36, 41),
    lowest=0,
    highest=63,
  )


CODECS: dict[str, Row] = {
  "jpeg": _jpeg("JPEG 4:2:0", "4:2:0", optimize=False),  # Pillow's defaults.
  "jpeg-optimized": _jpeg("JPEG 4:2:0, optimized Huffman tables", "4:2:0", optimize=True),
  "jpeg444": _jpeg("JPEG 4:4:4", "4:4:4", optimize=False),
  "jpeg444-optimized": _jpeg("JPEG 4:4:4, optimized Huffman tables", "4:4:4", optimize=True),
  "webp": _webp(),
  "jpeg2000": _jpeg2000(by_rate=True),
  "jpeg2000-psnr": _jpeg2000(by_rate=False),
  "avif": _avif("4:4:4"),
  "avif420": _avif("4:2:0"),
  "jxl": _jxl(),
  "jpegli": _jpegli(),
  "mozjpeg": _mozjpeg("4:2:0", flat=False),
  "mozjpeg444": _mozjpeg("4:4:4", flat=False),
  "mozjpeg-flat": _mozjpeg("4:2:0", flat=True),
  "mozjpeg444-flat": _mozjpeg("4:4:4", flat=True),
  "bpg": _bpg("4:4:4"),
  "bpg420": _bpg("4:2:0"),
  "vtm": _vtm(),
}


def make(name: str, quality: int) -> Codec:
  """The codec `name` at a quality (its row says from where to where; higher is better).

  Raises:
    ClassicalError: It is unknown, its library is missing, or the quality is out of range.
  """
  _check_quality(name, quality)
  reason = missing(name)
  if reason is not None:
    raise ClassicalError(f"{name} cannot be used: {reason}.")
  return _row(name).make(quality)


def _check_quality(name: str, quality: int) -> None:
  lowest, highest = _row(name).lowest, _row(name).highest
  if not lowest <= quality <= highest:
    raise ClassicalError(f"--qualities: {name} takes {lowest} to {highest}, not {quality}.")


def _row(name: str) -> Row:
  if name not in CODECS:
    raise ClassicalError(f"Unknown codec {name!r}. Known: {', '.join(CODECS)}.")
  return CODECS[name]


def missing(name: str) -> Optional[str]:
  """Why the codec cannot be used here, or None where it can."""
  try:
    _row(name).versions()
  except ClassicalError as e:
    return str(e)
  return None


def measure(codec: Codec, name: str, image: np.ndarray, lpips: bool = True) -> results.EvalRecord:
  """Compresses and decompresses one picture, uint8 [H, W, 3]; `lpips` where there are weights."""
  start = time.perf_counter()
  file = codec.compress(image)
  encoded = time.perf_counter()
  decoded = codec.decompress(file)
  end = time.perf_counter()
  num_pixels = image.shape[0] * image.shape[1]
  return results.EvalRecord(
    image=name,
    num_pixels=num_pixels,
    num_bytes=len(file),
    bpp=8 * len(file) / num_pixels,
    bpp_estimated=None,
    seconds_encode=encoded - start,
    seconds_decode=end - encoded,
    **metrics.measure(image, decoded, lpips),
  )


def evaluate(
  name: str,
  qualities: Sequence[int],
  images: Images,
  jobs: int = 1,
  lpips: bool = True,
  partials: Optional[Sequence[results.Partial]] = None,
) -> list[results.ResultFile]:
  """Measures a codec on all pictures.

  Args:
    name: A key of CODECS.
    qualities: One result each.
    images: The data set; each picture is loaded once, and at most `jobs` are in memory.
    jobs: Pictures at work at the same time. More than one makes it faster, and the seconds
      that are recorded a little longer.
    lpips: Whether to measure LPIPS, where there are weights.
    partials: Of each quality, where records are kept as they are measured; those that are there
      are not measured again.

  Raises:
    ClassicalError: See `make`; or a picture is too large for the format.
  """
  row = _row(name)
  library, version = next(iter(row.versions().items()))
  codecs = [make(name, quality) for quality in qualities]
  keep: list[Optional[results.Partial]] = [None] * len(codecs)
  if partials is not None:
    keep = list(partials)
  for codec in codecs[:1]:
    codec.decompress(codec.compress(np.zeros([16, 16, 3], np.uint8)))  # Loads the library.

  def measure_image(index: int) -> list[results.EvalRecord]:
    image_name, image = images[index]
    before = [None if p is None else p.records.get(image_name) for p in keep]
    return [r or measure(c, image_name, image, lpips) for c, r in zip(codecs, before)]

  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    tasks = [pool.submit(measure_image, index) for index in range(len(images))]
    try:
      done = concurrent.futures.as_completed(tasks)
      for task in tqdm.tqdm(done, desc=name, total=len(tasks), unit="picture", disable=None):
        for partial, record in zip(keep, task.result()):
          if partial is not None and record.image not in partial.records:
            partial.append(record)
    except BaseException:
      for task in tasks:
        task.cancel()
      raise
  by_image = [task.result() for task in tasks]
  git = runs.git_state(configs.PROJECT_DIR)
  return [
    results.ResultFile(
      run={
        "family": FAMILY,
        "xid": name,
        "wid": quality,
        "runname": f"quality={quality}",
        **git,
        "workdir": None,
        "device": runs.processor(),
        "label": f"{row.label} ({library} {version})",
      },
      config=_config(name, quality, jobs),
      overrides={},
      step=0,
      dataset={
        "name": images.name,
        "images": [records[k].image for records in by_image],
        "hash": images.hash,
      },
      mode="bitstream",
      records=tuple(records[k] for records in by_image),
    )
    for k, quality in enumerate(qualities)
  ]


def _config(name: str, quality: int, jobs: int) -> dict[str, Any]:
  row = _row(name)
  return {
    "codec": name,
    "quality": quality,
    **row.settings,
    "versions": row.versions(),
    "jobs": jobs,
  }


def _result_path(
  name: str, quality: int, images: Images, results_dir: runs.PathLike
) -> pathlib.Path:
  run = {"family": FAMILY, "xid": name, "wid": quality, "runname": f"quality={quality}"}
  return results.result_path(results_dir, images.name, "bitstream", run, step=0)


def _is_done(name: str, quality: int, images: Images, results_dir: runs.PathLike) -> bool:
  """Whether the results are there, of these pictures, this codec and these library versions."""
  path = _result_path(name, quality, images, results_dir)
  if not path.is_file():
    return False
  try:
    found = results.read(path)
  except results.ResultError as e:
    print(f"Measuring anew: {e}")
    return False
  differs = runs.differences({**found.config, "jobs": 0}, _config(name, quality, jobs=0))
  if found.dataset.get("hash") != images.hash:
    differs.append("pictures")
  if differs:
    print(f"Measuring {name} quality={quality} anew: other {', '.join(differs)} than before.")
  return not differs


def _define(values: absl_flags.FlagValues) -> None:
  absl_flags.DEFINE_string("dataset", None, "A known name, a folder or a glob.", flag_values=values)
  absl_flags.DEFINE_list(
    "codec", ["jpeg"], f"One or more of: {', '.join(CODECS)}.", flag_values=values
  )
  absl_flags.DEFINE_list(
    "qualities", None, f"Qualities (default: {','.join(map(str, QUALITIES))}).", flag_values=values
  )
  absl_flags.DEFINE_integer(
    "jobs", 0, "Pictures at work at the same time; 0: one a processor.", flag_values=values
  )
  absl_flags.DEFINE_string(
    "results_dir", str(configs.RESULTS_DIR), "Where results go.", flag_values=values
  )
  absl_flags.DEFINE_bool(
    "skip_existing", True, "Leave out what is measured already.", flag_values=values
  )
  absl_flags.DEFINE_bool(
    "lpips", True, "Measure LPIPS too, where there are weights.", flag_values=values
  )


def _qualities(given: Optional[Sequence[str]]) -> Optional[list[int]]:
  if given is None:
    return None
  try:
    qualities = sorted({int(q) for q in given})
  except ValueError as e:
    raise flags.UsageError(
      f"--qualities={','.join(given)}: whole numbers with commas between."
    ) from e
  if not qualities:
    raise flags.UsageError("--qualities needs a number or more: --qualities=10,50,90")
  return qualities


def run(argv: Sequence[str]) -> None:
  """The command; `argv` without the program's name.

  Raises:
    flags.UsageError, ClassicalError, data.DataError: The message names the fix.
  """
  values, _, _ = flags.parse(argv, _define, USAGE, allow_config=False)
  if not values.dataset:
    raise flags.UsageError(f"--dataset is needed. Known: {', '.join(data.known_datasets())}.")
  if values.jobs < 0:
    raise flags.UsageError(f"--jobs={values.jobs}: 1 or more, or 0 for one a processor.")
  given = _qualities(values.qualities)
  wanted: dict[str, list[int]] = {}
  for name in dict.fromkeys(values.codec):
    wanted[name] = given or list(_row(name).qualities)
    for quality in wanted[name]:
      _check_quality(name, quality)
    reason = missing(name)
    if reason is not None:
      print(f"Left out {name}: {reason}.", file=sys.stderr)
      del wanted[name]
  if not wanted:
    raise ClassicalError("No codec is left to measure.")
  images = data.load_eval_images(values.dataset)
  print(f"{images.name}: {len(images)} pictures, hash {images.hash[:12]}")
  jobs = min(values.jobs or os.cpu_count() or 1, len(images))
  for name, qualities in wanted.items():
    if values.skip_existing:
      todo = [q for q in qualities if not _is_done(name, q, images, values.results_dir)]
    else:
      todo = qualities
    if len(todo) < len(qualities):
      there = len(qualities) - len(todo)
      print(f"{name}: {there} of {len(qualities)} qualities are there already.")
    if not todo:
      continue
    with contextlib.ExitStack() as stack:
      partials = []
      for quality in todo:
        of = {
          "config": {**_config(name, quality, jobs), "jobs": None},
          "dataset": {"name": images.name, "hash": images.hash},
          "lpips": values.lpips and metrics.lpips_weights() is not None,
          "code": results.code_hash("common"),
        }
        path = _result_path(name, quality, images, values.results_dir)
        partials.append(results.Partial(path, of, anew=not values.skip_existing))
        stack.enter_context(partials[-1])
      measured = evaluate(name, todo, images, jobs, values.lpips, partials)
      for result, partial in zip(measured, partials):
        path = results.write(values.results_dir, result)
        partial.remove()
        print(f"{_summary(result)}  {path.name}")


def _summary(result: results.ResultFile) -> str:
  bpp, psnr, msssim = (result.mean(f) for f in ("bpp", "psnr_db", "msssim"))
  parts = [f"{result.run['xid']:>14} q={result.run['wid']:<3} {bpp:7.4f} bpp"]
  parts.append("  lossless" if psnr is None else f"{psnr:7.3f} dB")
  parts.append("" if msssim is None else f"MS-SSIM {msssim:.5f}")
  lpips = result.mean("lpips")
  parts.append("" if lpips is None else f"LPIPS {lpips:.4f}")
  return "  ".join(parts)


def main() -> None:
  """The command line."""
  try:
    run(sys.argv[1:])
  except (
    flags.UsageError,
    ClassicalError,
    data.DataError,
    results.ResultError,
    runs.RunError,
    OSError,
  ) as e:
    flags.fail(e)
  except KeyboardInterrupt:
    sys.exit(130)


if __name__ == "__main__":
  main()
