"""The container of every learned codec's bitstream: header, sections, checksums.

| bytes | what |
|---|---|
| 4 | magic `NTC` and the format's version |
| 1 + n | family: length, ASCII name |
| 6 | model fingerprint: what decodes these bytes (coding tables and synthesis weights) |
| 1 to 5 each | image height, width (varint) |
| 1 | number of sections |
| 1 to 5, 4 | for each section: length (varint), CRC-32 |
| 4 | CRC-32 of the decoded symbols |
| 4 | CRC-32 of the header so far |
| | the sections |

A factorized file of a Kodak picture spends 41 bytes on it. Nothing is believed before its checksum
holds, and nothing is allocated from sizes before they are bounded.
"""

import dataclasses
import os
import zlib

FORMAT_VERSION = 4  # 4: integer hyper-syntheses have other roundings.
FINGERPRINT_BYTES = 6
MAX_SECTIONS = 16

# Pictures beyond this are refused, when they are written and when they are read: 8,192 x 8,192.
# It bounds the memory that any file can ask for (docs/results.md, "Robustness");
# NTC_MAX_PIXELS sets another bound.
MAX_PIXELS = int(os.environ.get("NTC_MAX_PIXELS") or 1 << 26)

_MAGIC = b"NTC"


class BitstreamError(ValueError):
  """The bytes cannot be decoded by this model; the message says why."""


@dataclasses.dataclass(frozen=True)
class Bitstream:
  """A file's content.

  Attributes:
    family: The entropy-model folder that wrote it.
    fingerprint: FINGERPRINT_BYTES bytes that identify the decoding model.
    height: Of the image, in pixels.
    width: Of the image, in pixels.
    sections: The coded latents, in the family's order.
    symbols_crc: CRC-32 of what the sections decode to, chained over them.
  """

  family: str
  fingerprint: bytes
  height: int
  width: int
  sections: tuple[bytes, ...]
  symbols_crc: int


def write(stream: Bitstream) -> bytes:
  """The whole file."""
  name = stream.family.encode("ascii")
  if not 0 < len(name) < 64 or len(stream.fingerprint) != FINGERPRINT_BYTES:
    raise ValueError(f"Family {stream.family!r} or the fingerprint has a wrong length.")
  if not 0 < len(stream.sections) <= MAX_SECTIONS:
    raise ValueError(f"{len(stream.sections)} sections; there must be 1 to {MAX_SECTIONS}.")
  check_size(stream.height, stream.width)
  header = bytearray(_MAGIC)
  header.append(FORMAT_VERSION)
  header.append(len(name))
  header += name + stream.fingerprint + varint(stream.height) + varint(stream.width)
  header.append(len(stream.sections))
  for section in stream.sections:
    header += varint(len(section)) + zlib.crc32(section).to_bytes(4, "little")
  header += stream.symbols_crc.to_bytes(4, "little")
  header += zlib.crc32(header).to_bytes(4, "little")
  return bytes(header) + b"".join(stream.sections)


def read(data: bytes) -> Bitstream:
  """Parses and checks a file.

  Raises:
    BitstreamError: Not such a file, of another version, truncated, or damaged.
  """
  data = bytes(data)
  cursor = Cursor(data)
  if cursor.take(3, "magic") != _MAGIC:
    raise BitstreamError("Not a bitstream of this project (the magic bytes are missing).")
  version = cursor.take(1, "version")[0]
  if version != FORMAT_VERSION:
    raise BitstreamError(
      f"Format version {version}; this code reads {FORMAT_VERSION}. Decode the file with the code "
      "that wrote it, and compress again."
    )
  name = cursor.take(cursor.take(1, "family")[0], "family")
  fingerprint = cursor.take(FINGERPRINT_BYTES, "fingerprint")
  height, width = cursor.varint("height"), cursor.varint("width")
  num_sections = cursor.take(1, "sections")[0]
  if not 0 < num_sections <= MAX_SECTIONS:
    raise BitstreamError(f"The header claims {num_sections} sections: damaged or hostile.")
  sizes, checksums = [], []
  for _ in range(num_sections):
    sizes.append(cursor.varint("section length"))
    checksums.append(int.from_bytes(cursor.take(4, "section checksum"), "little"))
  symbols_crc = int.from_bytes(cursor.take(4, "symbols checksum"), "little")
  end = cursor.position
  if int.from_bytes(cursor.take(4, "header checksum"), "little") != zlib.crc32(data[:end]):
    raise BitstreamError("The header's checksum does not hold: the file is damaged.")
  check_size(height, width)
  if cursor.position + sum(sizes) != len(data):
    raise BitstreamError(
      f"The header announces {cursor.position + sum(sizes)} bytes, the file has {len(data)}: "
      "truncated, or something was appended."
    )
  sections = []
  for i, (size, checksum) in enumerate(zip(sizes, checksums)):
    section = cursor.take(size, "section")
    if zlib.crc32(section) != checksum:
      raise BitstreamError(f"The checksum of section {i} does not hold: the file is damaged.")
    sections.append(section)
  try:
    family = name.decode("ascii")
  except UnicodeDecodeError as e:
    raise BitstreamError("The family's name is not ASCII: damaged or hostile.") from e
  return Bitstream(family, fingerprint, height, width, tuple(sections), symbols_crc)


def check_size(height: int, width: int) -> None:
  """Raises BitstreamError for sizes of no picture, or of one beyond MAX_PIXELS."""
  if height < 1 or width < 1 or height * width > MAX_PIXELS:
    raise BitstreamError(
      f"A picture of {width}x{height} pixels: sizes are 1x1 to {MAX_PIXELS} pixels in all "
      "(NTC_MAX_PIXELS)."
    )


def check_model(stream: Bitstream, family: str, fingerprint: bytes) -> None:
  """Raises BitstreamError if another family or another model wrote the file."""
  if stream.family != family:
    raise BitstreamError(
      f"This file was written by the family {stream.family!r}, not by {family!r}."
    )
  if stream.fingerprint != fingerprint:
    raise BitstreamError(
      f"This file was written by model {stream.fingerprint.hex()}, this is {fingerprint.hex()}: "
      "decode it with the run (and checkpoint) that encoded it."
    )


class Cursor:
  """Reads forward; past the end is an error that says what was missing."""

  def __init__(self, data: bytes):
    """Starts at the first byte of `data`."""
    self._data = data
    self.position = 0

  @property
  def remaining(self) -> int:
    """Bytes not read yet."""
    return len(self._data) - self.position

  def rest(self) -> bytes:
    """All bytes not read yet."""
    return self.take(self.remaining, "rest")

  def take(self, count: int, what: str) -> bytes:
    """The next `count` bytes; `what` names them in the error."""
    end = self.position + count
    if end > len(self._data):
      raise BitstreamError(f"The file ends within its {what}: truncated.")
    taken = self._data[self.position : end]
    self.position = end
    return taken

  def varint(self, what: str) -> int:
    """The next number: seven bits a byte, lowest first, at most 35 bits."""
    value = 0
    for shift in range(0, 35, 7):
      byte = self.take(1, what)[0]
      value |= (byte & 0x7F) << shift
      if byte < 0x80:
        return value
    raise BitstreamError(f"The {what} is no number: damaged or hostile.")


def varint(value: int) -> bytes:
  """A non-negative number, seven bits a byte, lowest first."""
  out = bytearray()
  while value >= 0x80:
    out.append(value & 0x7F | 0x80)
    value >>= 7
  out.append(value)
  return bytes(out)
