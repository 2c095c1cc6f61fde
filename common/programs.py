"""Classical codecs that are programs: BPG and VTM (H.266/VVC), where they are on PATH.

Neither is in a package registry. BPG: `bpgenc` and `bpgdec` of Fabrice Bellard's libbpg. VTM:
`EncoderApp` and `DecoderApp` (or `EncoderAppStatic`, `DecoderAppStatic`) of the reference software,
and its `encoder_intra_vtm.cfg`, which is looked for in the `cfg` folder of the programs' checkout
unless NTC_VTM_CONFIG names it.
"""

import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Optional

import numpy as np
from PIL import Image

from common import bitstream

_ENCODERS = ("EncoderApp", "EncoderAppStatic")
_DECODERS = ("DecoderApp", "DecoderAppStatic")
_CONFIG = "encoder_intra_vtm.cfg"


class ProgramError(ValueError):
  """A program is missing, or it failed; the message holds its last words."""


def bpg_version() -> str:
  """Of the `bpgenc` on PATH.

  Raises:
    ProgramError: One of the two programs is not there.
  """
  encoder, _ = _find(["bpgenc"]), _find(["bpgdec"])
  return _version_in(encoder, r"version\s+([\w.]+)")


def bpg_encode(image: np.ndarray, qp: int, subsampling: str) -> bytes:
  """A BPG file of a picture, uint8 [H, W, 3]: 8 bits, YCbCr, the encoder's defaults otherwise.

  Args:
    image: Any size.
    qp: 0 (best) to 51.
    subsampling: "4:4:4" or "4:2:0".

  Raises:
    ProgramError: The program is missing or fails.
  """
  with tempfile.TemporaryDirectory() as folder:
    source, target = pathlib.Path(folder, "in.png"), pathlib.Path(folder, "out.bpg")
    Image.fromarray(image).save(source, compress_level=1)
    form = subsampling.replace(":", "")
    _run([_find(["bpgenc"]), "-q", qp, "-f", form, "-b", 8, "-o", target, source])
    return target.read_bytes()


def bpg_decode(data: bytes) -> np.ndarray:
  """The picture of a BPG file, uint8 [H, W, 3].

  Raises:
    bitstream.BitstreamError: The program does not decode it.
    ProgramError: The program is missing.
  """
  decoder = _find(["bpgdec"])
  with tempfile.TemporaryDirectory() as folder:
    source, target = pathlib.Path(folder, "in.bpg"), pathlib.Path(folder, "out.png")
    source.write_bytes(data)
    try:
      _run([decoder, "-o", target, source])
      with Image.open(target, formats=["PNG"]) as image:
        return np.array(image.convert("RGB"))
    except (ProgramError, OSError) as e:
      raise bitstream.BitstreamError(f"bpgdec does not decode it: {e}") from e


def vtm_version() -> str:
  """Of the VTM encoder on PATH.

  Raises:
    ProgramError: A program or the configuration is not there.
  """
  encoder, _ = _find(_ENCODERS), _find(_DECODERS)
  _vtm_config(encoder)
  return _version_in(encoder, r"Encoder Version\s*\[?([\w.]+)")


def vtm_encode(image: np.ndarray, qp: int) -> bytes:
  """A VVC stream of a picture, uint8 [H, W, 3]: intra, 4:4:4, 8 bits, YCbCr of BT.709, full range.

  The stream does not say how large its decoded planes are in a file, so height and width come
  first: 2 to 10 bytes, which count.

  Args:
    image: Any size that the encoder takes; it pads to a multiple of 8.
    qp: 0 (best) to 63.

  Raises:
    ProgramError: The program is missing or fails.
  """
  encoder = _find(_ENCODERS)
  height, width = image.shape[:2]
  with tempfile.TemporaryDirectory() as folder:
    source, target = pathlib.Path(folder, "in.yuv"), pathlib.Path(folder, "out.bin")
    source.write_bytes(np.ascontiguousarray(np.moveaxis(to_ycbcr(image), 2, 0)).tobytes())
    settings = {
      "InputFile": source, "BitstreamFile": target, "ReconFile": os.devnull, "QP": qp,
      "SourceWidth": width, "SourceHeight": height, "FrameRate": 1, "FramesToBeEncoded": 1,
      "InputBitDepth": 8, "InputChromaFormat": 444, "ConformanceWindowMode": 1,
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in settings.items()]
    _run([encoder, "-c", _vtm_config(encoder), *options])
    return bitstream.varint(height) + bitstream.varint(width) + target.read_bytes()


def vtm_decode(data: bytes) -> np.ndarray:
  """The inverse of `vtm_encode`.

  Raises:
    bitstream.BitstreamError: The program does not decode it, or to another size.
    ProgramError: The program is missing.
  """
  decoder = _find(_DECODERS)
  cursor = bitstream.Cursor(data)
  height, width = cursor.varint("height"), cursor.varint("width")
  bitstream.check_size(height, width)
  with tempfile.TemporaryDirectory() as folder:
    source, target = pathlib.Path(folder, "in.bin"), pathlib.Path(folder, "out.yuv")
    source.write_bytes(data[cursor.position :])
    try:
      _run([decoder, "-b", source, "-o", target, "-d", 8])
      planes = np.frombuffer(target.read_bytes(), np.uint8)
    except (ProgramError, OSError) as e:
      raise bitstream.BitstreamError(f"The VTM decoder does not decode it: {e}") from e
  if planes.size != 3 * height * width:
    raise bitstream.BitstreamError(
      f"The stream decodes to {planes.size} samples, not to 3 x {height} x {width}: damaged."
    )
  return to_rgb(np.moveaxis(planes.reshape(3, height, width), 0, 2))


# BT.709, full range: Y = sum of weights times R, G, B; Cb and Cr are scaled differences to Y.
_WEIGHTS = np.array([0.2126, 0.7152, 0.0722])


def to_ycbcr(image: np.ndarray) -> np.ndarray:
  """uint8 [H, W, 3] RGB to YCbCr of BT.709, full range, rounded."""
  rgb = image.astype(np.float64)
  y = rgb @ _WEIGHTS
  cb = 128 + (rgb[..., 2] - y) / (2 * (1 - _WEIGHTS[2]))
  cr = 128 + (rgb[..., 0] - y) / (2 * (1 - _WEIGHTS[0]))
  return _to_uint8(np.stack([y, cb, cr], -1))


def to_rgb(ycbcr: np.ndarray) -> np.ndarray:
  """The inverse of `to_ycbcr` up to rounding."""
  y, cb, cr = np.moveaxis(ycbcr.astype(np.float64), -1, 0)
  r = y + (cr - 128) * 2 * (1 - _WEIGHTS[0])
  b = y + (cb - 128) * 2 * (1 - _WEIGHTS[2])
  g = (y - _WEIGHTS[0] * r - _WEIGHTS[2] * b) / _WEIGHTS[1]
  return _to_uint8(np.stack([r, g, b], -1))


def _to_uint8(values: np.ndarray) -> np.ndarray:
  return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _find(names: Sequence[str]) -> str:
  for name in names:
    found = shutil.which(name)
    if found is not None:
      return found
  raise ProgramError(f"the program {' or '.join(names)} is not on PATH")


def _vtm_config(encoder: str) -> pathlib.Path:
  given = os.environ.get("NTC_VTM_CONFIG")
  places = [pathlib.Path(given)] if given else [
    folder / "cfg" / _CONFIG for folder in list(pathlib.Path(encoder).resolve().parents)[:3]
  ]  # fmt: skip
  for place in places:
    if place.is_file():
      return place
  raise ProgramError(f"{_CONFIG} is not at {' or '.join(map(str, places))}: set NTC_VTM_CONFIG")


def _version_in(program: str, pattern: str) -> str:
  """What a program says of its version when it is called without arguments."""
  try:
    done = subprocess.run([program], capture_output=True, text=True, errors="replace", timeout=30)
  except (OSError, subprocess.SubprocessError) as e:
    raise ProgramError(f"{program} does not start: {e}") from e
  found: Optional[re.Match[str]] = re.search(pattern, done.stdout + done.stderr)
  return found.group(1) if found else "unknown"


def _run(argv: Sequence[object]) -> None:
  command = [str(a) for a in argv]
  try:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
  except OSError as e:
    raise ProgramError(f"{command[0]} does not start: {e}") from e
  if done.returncode != 0:
    words = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
    raise ProgramError(
      f"{pathlib.Path(command[0]).name} ended with {done.returncode}: {' / '.join(words)}"
    )
