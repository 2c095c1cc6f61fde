"""Quantized DCT coefficients and tables <-> baseline .jpg files (JFIF), in memory.

Coefficients are int16 [rows, cols, 8, 8] a component (luma; then Cb and Cr): a block's vertical
frequency first, its horizontal frequency second, not in zigzag order. Tables are [8, 8] in the same
order. Nothing is lost on the way: what is written is read back.

The writer is our own: its Huffman codes are the best for the file, the exact number of bits is
known without writing, and it holds no global state. The reader is libjpeg's (jpeglib), for any JPEG
file of 8 bits that is grey or YCbCr, progressive ones too.
"""

import io
import struct
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np

from common import bitstream
from ljpeg import huffman

# Component sampling (vertical, horizontal) of luma; chroma has (1, 1).
SUBSAMPLINGS = {"4:4:4": (1, 1), "4:2:0": (2, 2)}

MAX_SIDE = 65500  # Pixels: libjpeg's limit; the format's is 65535.
MAX_AC = 1023  # Baseline: 10 bits.
MAX_DC_DIFFERENCE = 2047  # Baseline: 11 bits.

# ZIGZAG[i] is the place in a block, row by row, of the i-th coefficient in a file.
ZIGZAG = np.array(
  sorted(range(64), key=lambda n: (n // 8 + n % 8, (n // 8 if (n // 8 + n % 8) % 2 else n % 8)))
)
EOB, ZRL = 0x00, 0xF0  # Symbols: end of block; sixteen zeros.

# Bits that a magnitude needs: SIZE[abs(v)].
SIZE = np.zeros(4096, np.uint8)
for _bits in range(1, 13):
  SIZE[1 << (_bits - 1) : 1 << _bits] = _bits


class JpegFileError(ValueError):
  """Something cannot be a baseline JPEG file, or is no JPEG file; the message says what."""


class JpegImage(NamedTuple):
  """What a .jpg file holds.

  Attributes:
    components: One (grey) or three (Y, Cb, Cr) int16 [rows, cols, 8, 8]; see `grid`.
    tables: One a component, int64 [8, 8].
    size: (height, width) in pixels.
    subsampling: "4:4:4" or "4:2:0"; "4:4:4" for grey.
  """

  components: tuple[np.ndarray, ...]
  tables: tuple[np.ndarray, ...]
  size: tuple[int, int]
  subsampling: str


def grid(size: tuple[int, int], subsampling: str = "4:4:4", component: int = 0) -> tuple[int, int]:
  """(rows, cols) of blocks of a component (0: luma or grey) for a picture (height, width).

  Raises:
    JpegFileError: The subsampling is unknown.
  """
  vertical, horizontal = _factors(subsampling) if component else (1, 1)
  return -(-size[0] // (8 * vertical)), -(-size[1] // (8 * horizontal))


def _factors(subsampling: str) -> tuple[int, int]:
  if subsampling not in SUBSAMPLINGS:
    raise JpegFileError(f"Unknown subsampling {subsampling!r}. Known: {', '.join(SUBSAMPLINGS)}.")
  return SUBSAMPLINGS[subsampling]


# --- Symbols --------------------------------------------------------------------------------------


class Symbols(NamedTuple):
  """A component's blocks [n] as run-length symbols, in the order in which they are coded.

  Attributes:
    dc: int64 [n], difference of the DC coefficient to the block before.
    dc_size: uint8 [n], its symbol.
    block: int64 [m], the block of each AC coefficient that is not zero.
    value: int64 [m], the coefficient.
    size: uint8 [m], bits of its magnitude.
    run: int64 [m], zeros before it, 0..62.
    ends: bool [n], whether the block ends with EOB.
  """

  dc: np.ndarray
  dc_size: np.ndarray
  block: np.ndarray
  value: np.ndarray
  size: np.ndarray
  run: np.ndarray
  ends: np.ndarray

  @property
  def ac(self) -> np.ndarray:
    """The symbol of each AC coefficient, after its ZRLs: int64 [m]."""
    return (self.run & 15) << 4 | self.size

  def histograms(self) -> tuple[np.ndarray, np.ndarray]:
    """How often each DC and each AC symbol occurs: int64 [256] each."""
    ac = np.bincount(self.ac, minlength=256)
    ac[EOB] += np.count_nonzero(self.ends)
    ac[ZRL] += int((self.run >> 4).sum())
    return np.bincount(self.dc_size, minlength=256), ac

  def num_extra_bits(self) -> int:
    """Bits beside the Huffman codes: signs and magnitudes."""
    return int(self.dc_size.sum(dtype=np.int64)) + int(self.size.sum(dtype=np.int64))


def symbols(blocks: np.ndarray) -> Symbols:
  """Run lengths of blocks in zigzag order, [n, 64], in the order in which they are coded.

  Raises:
    JpegFileError: A coefficient is out of the range of baseline JPEG.
  """
  dc = np.diff(blocks[:, 0].astype(np.int64), prepend=0)
  if len(dc) and max(dc.max(), -dc.min()) > MAX_DC_DIFFERENCE:
    raise JpegFileError(
      f"DC coefficients of neighbours differ by more than {MAX_DC_DIFFERENCE}: baseline JPEG "
      "cannot hold them."
    )
  flat = np.ascontiguousarray(blocks).reshape(-1)
  place = np.flatnonzero(flat)
  place = place[place & 63 != 0]
  block, position = place >> 6, place & 63
  value = flat[place].astype(np.int64)
  if len(value) and max(value.max(), -value.min()) > MAX_AC:
    raise JpegFileError(
      f"An AC coefficient is beyond {MAX_AC}: baseline JPEG cannot hold it. Larger tables help."
    )
  first = np.diff(block, prepend=-1) != 0
  run = position - 1
  run[1:] -= np.where(first[1:], 0, position[:-1])
  ends = np.ones(len(blocks), bool)
  ends[block[position == 63]] = False
  return Symbols(dc, SIZE[np.abs(dc)], block, value, SIZE[np.abs(value)], run, ends)


# --- Writing --------------------------------------------------------------------------------------


class _Component(NamedTuple):
  """A component that is ready to be written.

  Attributes:
    symbols: Its blocks' (those that only fill up the last MCUs included), in coding order.
    order: int64 [n], each block's place among all blocks of the scan.
  """

  symbols: Symbols
  order: np.ndarray


class Plan(NamedTuple):
  """All that is known of a file before its bytes are.

  Attributes:
    components: Ready to be written.
    tables: [8, 8], one a component; equal ones are written once.
    dc_codes: Of luma, and of chroma where there is chroma.
    ac_codes: The same.
    size: (height, width).
    subsampling: "4:4:4" or "4:2:0".
  """

  components: tuple[_Component, ...]
  tables: tuple[np.ndarray, ...]
  dc_codes: tuple[huffman.HuffmanTable, ...]
  ac_codes: tuple[huffman.HuffmanTable, ...]
  size: tuple[int, int]
  subsampling: str

  @property
  def num_bits(self) -> int:
    """Bits of the whole file, without padding and stuffed bytes."""
    return self.scan_bits() + 8 * (len(_headers(self)) + 2)

  def scan_bits(self) -> int:
    """Bits of the entropy-coded data, without padding and stuffed bytes."""
    total = 0
    for i, component in enumerate(self.components):
      dc, ac = component.symbols.histograms()
      total += int(dc @ self.dc_codes[min(i, 1)].lengths)
      total += int(ac @ self.ac_codes[min(i, 1)].lengths)
      total += component.symbols.num_extra_bits()
    return total


def plan(
  components: Sequence[np.ndarray],
  tables: Sequence[np.ndarray],
  size: tuple[int, int],
  subsampling: str = "4:4:4",
) -> Plan:
  """Checks what is to be written, and chooses the Huffman codes; arguments as `write_jpeg`."""
  _check_size(size)
  _factors(subsampling)
  if len(components) not in (1, 3):
    raise JpegFileError(f"{len(components)} components; a file has 1 (grey) or 3 (Y, Cb, Cr).")
  if len(components) == 1:
    subsampling = "4:4:4"
  checked = tuple(_check_table(t) for t in tables)
  if not 1 <= len(checked) <= len(components):
    raise JpegFileError(
      f"{len(checked)} tables for {len(components)} components; give luma and chroma."
    )
  made = []
  for i, blocks in enumerate(components):
    rows, cols = grid(size, subsampling, i)
    blocks = np.asarray(blocks)
    if blocks.shape != (rows, cols, 8, 8):
      raise JpegFileError(
        f"Component {i} has shape {list(blocks.shape)}; a picture of {size[0]}x{size[1]} (height x "
        f"width), {subsampling}, needs {[rows, cols, 8, 8]}."
      )
    if not np.issubdtype(blocks.dtype, np.integer):
      raise JpegFileError(f"Coefficients must be integers, not {blocks.dtype}.")
    zigzag = blocks.reshape(rows, cols, 64)[:, :, ZIGZAG]
    made.append(_in_order(zigzag, i, subsampling, len(components)))
  counts = [c.symbols.histograms() for c in made]
  groups = [counts[:1], counts[1:]] if len(made) > 1 else [counts]
  dc_codes = tuple(huffman.optimal(np.sum([dc for dc, _ in group], axis=0)) for group in groups)
  ac_codes = tuple(huffman.optimal(np.sum([ac for _, ac in group], axis=0)) for group in groups)
  checked += checked[-1:] * (len(components) - len(checked))
  return Plan(tuple(made), checked, dc_codes, ac_codes, (size[0], size[1]), subsampling)


def coding_order(
  rows: int, cols: int, factors: tuple[int, int] = (1, 1)
) -> tuple[np.ndarray, np.ndarray]:
  """The order in which a component's blocks are coded where an MCU holds `factors` of them.

  Returns:
    The blocks' indexes row by row, int64 [n], -1 for those beyond the edge that only fill up an
    MCU; and each one's MCU, int64 [n].
  """
  vertical, horizontal = factors
  mcu_cols = -(-cols // horizontal)
  index = np.arange(-(-rows // vertical) * vertical * mcu_cols * horizontal)
  mcu, part = np.divmod(index, vertical * horizontal)
  row = mcu // mcu_cols * vertical + part // horizontal
  col = mcu % mcu_cols * horizontal + part % horizontal
  return np.where((row < rows) & (col < cols), row * cols + col, -1), mcu


def _in_order(
  zigzag: np.ndarray, component: int, subsampling: str, num_components: int
) -> _Component:
  """Blocks [rows, cols, 64] in coding order. Those beyond the edge are made to cost least: no AC
  coefficients, and the DC coefficient of the block before."""
  luma = _factors(subsampling)
  order, mcu = coding_order(zigzag.shape[0], zigzag.shape[1], (1, 1) if component else luma)
  blocks = zigzag.reshape(-1, 64)[order]
  if (order < 0).any():
    blocks[order < 0] = 0
    last = np.maximum.accumulate(np.where(order < 0, 0, np.arange(len(order))))
    blocks[:, 0] = blocks[last, 0]
  luma_blocks = luma[0] * luma[1]
  if component:
    place = mcu * (luma_blocks + num_components - 1) + luma_blocks + component - 1
  else:
    place = mcu * (luma_blocks + num_components - 1) + np.arange(len(order)) % luma_blocks
  return _Component(symbols(blocks), place)


def _check_size(size: tuple[int, int]) -> None:
  if not all(1 <= side <= MAX_SIDE for side in size):
    raise JpegFileError(
      f"A JPEG file has 1 to {MAX_SIDE} pixels a side; the picture has {size[0]}x{size[1]}."
    )


def _check_table(table: np.ndarray) -> np.ndarray:
  table = np.asarray(table)
  if table.shape != (8, 8):
    raise JpegFileError(f"A table has shape {list(table.shape)} instead of [8, 8].")
  whole = np.round(table).astype(np.int64)
  if not np.array_equal(whole, table) or whole.min() < 1 or whole.max() > 255:
    raise JpegFileError("A table of baseline JPEG holds whole numbers from 1 to 255.")
  return whole


def write_jpeg(
  components: Sequence[np.ndarray],
  tables: Sequence[np.ndarray],
  size: tuple[int, int],
  subsampling: str = "4:4:4",
) -> bytes:
  """A baseline JFIF file with the best Huffman codes for these coefficients.

  Args:
    components: One (grey) or three (Y, Cb, Cr) of integers [rows, cols, 8, 8], see `grid`:
      quantized coefficients in natural order. AC in -1023..1023.
    tables: [8, 8] of whole numbers 1..255, natural order; luma, chroma. With three, Cr has one of
      its own; with one, all share it.
    size: (height, width) in pixels.
    subsampling: "4:4:4" or "4:2:0".

  Raises:
    JpegFileError: No baseline file can hold them; the message says why.
  """
  return render(plan(components, tables, size, subsampling))


def render(plan: Plan) -> bytes:
  """The bytes of a planned file."""
  scan = _scan(plan)
  return b"".join((_headers(plan), scan, b"\xff\xd9"))


def _headers(plan: Plan) -> bytes:
  number = len(plan.components)
  factors = _factors(plan.subsampling)
  parts = [b"\xff\xd8", _segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")]
  tables = [table.reshape(64)[ZIGZAG].astype(np.uint8).tobytes() for table in plan.tables]
  different = list(dict.fromkeys(tables))
  parts.append(_segment(0xDB, b"".join(bytes([i]) + t for i, t in enumerate(different))))
  frame = struct.pack(">BHHB", 8, plan.size[0], plan.size[1], number)
  for i in range(number):
    vertical, horizontal = factors if i == 0 else (1, 1)
    frame += bytes([i + 1, horizontal << 4 | vertical, different.index(tables[i])])
  parts.append(_segment(0xC0, frame))
  codes = b""
  for kind, group in ((0x00, plan.dc_codes), (0x10, plan.ac_codes)):
    for i, code in enumerate(group):
      codes += bytes([kind | i]) + code.counts.astype(np.uint8).tobytes() + code.symbols.tobytes()
  parts.append(_segment(0xC4, codes))
  scan = bytes([number])
  for i in range(number):
    scan += bytes([i + 1, min(i, 1) * 0x11])
  parts.append(_segment(0xDA, scan + b"\0\x3f\0"))
  return b"".join(parts)


def _segment(marker: int, content: bytes) -> bytes:
  return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _scan(plan: Plan) -> bytes:
  """The entropy-coded data with its stuffed bytes."""
  total_blocks = sum(len(c.order) for c in plan.components)
  block_bits = np.zeros(total_blocks, np.int64)
  entries = []
  for i, component in enumerate(plan.components):
    dc_code, ac_code = plan.dc_codes[min(i, 1)], plan.ac_codes[min(i, 1)]
    s = component.symbols
    order = component.order
    dc_bits = dc_code.lengths[s.dc_size] + s.dc_size
    ac = s.ac
    zeros = s.run >> 4
    ac_bits = zeros * ac_code.lengths[ZRL] + ac_code.lengths[ac] + s.size
    ends_at = np.cumsum(ac_bits)
    bounds = np.searchsorted(s.block, np.arange(len(order) + 1))
    before = np.concatenate([[0], ends_at])[bounds]  # [n + 1]
    body = dc_bits + np.diff(before)
    block_bits[order] = body + np.where(s.ends, ac_code.lengths[EOB], 0)
    entries.append((s, order, dc_code, ac_code, dc_bits, ac, ac_bits, ends_at, before, body))
  starts = np.cumsum(block_bits) - block_bits
  num_bits = int(block_bits.sum())
  words = np.zeros(num_bits // 64 + 2, np.uint64)
  for s, order, dc_code, ac_code, dc_bits, ac, _, ends_at, before, body in entries:
    start = starts[order]
    value = dc_code.codes[s.dc_size] << s.dc_size | _extra(s.dc, s.dc_size)
    _put(words, start, value, dc_bits)
    own = ac_code.lengths[ac] + s.size
    place = (start + dc_bits - before[:-1])[s.block] + ends_at - own
    _put(words, place, ac_code.codes[ac] << s.size | _extra(s.value, s.size), own)
    length = int(ac_code.lengths[ZRL])
    for count in range(1, 4):  # A run of 16..62 zeros takes up to three.
      has = s.run >> 4 >= count
      if not has.any():
        break
      zrl = place[has] - count * length
      _put(words, zrl, np.full(len(zrl), ac_code.codes[ZRL]), np.full(len(zrl), length))
    end = (start + body)[s.ends]
    length = int(ac_code.lengths[EOB])
    _put(words, end, np.full(len(end), ac_code.codes[EOB]), np.full(len(end), length))
  padding = -num_bits % 8
  if padding:
    _put(words, np.array([num_bits]), np.array([(1 << padding) - 1]), np.array([padding]))
  data = words.astype(">u8").tobytes()[: (num_bits + padding) // 8]
  return data.replace(b"\xff", b"\xff\0")


def _extra(value: np.ndarray, size: np.ndarray) -> np.ndarray:
  """The bits beside a symbol: the value, of negative ones less one, `size` bits."""
  return np.where(value < 0, value + (np.int64(1) << size.astype(np.int64)) - 1, value)


def _put(words: np.ndarray, place: np.ndarray, value: np.ndarray, bits: np.ndarray) -> None:
  """Writes `value`s of 1..32 bits at the bit `place`s into big-endian words of 64 bits.

  Places of words must rise together: the order of `place` is that of the scan, or close to it.
  """
  if not len(place):
    return
  word, offset = place >> 6, place & 63
  value, room = value.astype(np.uint64), 64 - offset - bits
  left = np.maximum(room, 0).astype(np.uint64)
  over = np.maximum(-room, 0).astype(np.uint64)
  _or(words, word, value << left >> over)
  split = np.flatnonzero(room < 0)
  if len(split):
    _or(words, word[split] + 1, value[split] << (64 - over[split]))


def _or(words: np.ndarray, word: np.ndarray, value: np.ndarray) -> None:
  """words[word] |= value, where `word` may repeat in one stretch."""
  starts = np.flatnonzero(np.diff(word, prepend=-1))
  # Two stretches of one word cannot be: within a component, places rise in coding order.
  words[word[starts]] |= np.bitwise_or.reduceat(value, starts)


# --- Reading --------------------------------------------------------------------------------------


def check_room(data: bytes, size: tuple[int, int]) -> None:
  """Checks the size that a file claims before anything is made for it.

  Decoders make up what a file lacks: a few bytes can claim a picture of gigabytes.

  Raises:
    bitstream.BitstreamError: The picture (height, width) is larger than pictures may be, or than
      the bytes can hold: a block takes a bit at the least.
  """
  bitstream.check_size(*size)
  rows, cols = grid(size)
  if rows * cols > 8 * len(data):
    raise bitstream.BitstreamError(
      f"{len(data)} bytes cannot hold {size[1]}x{size[0]} pixels: damaged or hostile."
    )


def _check_segments(data: bytes) -> None:
  """Raises JpegFileError for a segment shorter than its own length field: jpeglib trusts that."""
  at = 2
  while (at := data.find(b"\xff", at)) >= 0 and at + 3 < len(data):
    marker = data[at + 1]
    if marker == 0xFF:  # A fill byte.
      at += 1
    elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD9:  # Data, or a marker alone.
      at += 2
    else:
      length = int.from_bytes(data[at + 2 : at + 4], "big")
      if length < 2:
        raise JpegFileError(f"A segment of {length} bytes: damaged or hostile.")
      at += 2 + length


def read_jpeg(data: bytes) -> JpegImage:
  """Coefficients and tables of a .jpg file: baseline or progressive, grey or YCbCr, 8 bits.

  Raises:
    JpegFileError: It is no JPEG file, not whole, or of a kind that `JpegImage` does not describe.
  """
  from PIL import Image

  from common import libjpeg

  try:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
      size, mode = (image.height, image.width), image.mode
      check_room(data, size)
      image.load()  # Of a truncated file, libjpeg alone would make up the rest.
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
    raise JpegFileError(f"Not a whole JPEG file: {e}") from e
  if mode not in ("L", "RGB"):
    raise JpegFileError(f"A JPEG file of mode {mode}; only grey and YCbCr files can be read.")
  _check_segments(data)
  try:
    components, tables, factors = libjpeg.read_coefficients(data)
  except libjpeg.LibjpegError as e:
    raise JpegFileError(f"A JPEG file that libjpeg cannot take apart: {e}") from e
  subsampling: Optional[str] = "4:4:4"
  if len(components) == 3:
    chroma = factors[1]
    scale = (factors[0][0] / chroma[0], factors[0][1] / chroma[1])
    same = [name for name, factor in SUBSAMPLINGS.items() if factor == scale]
    subsampling = same[0] if same and factors[1] == factors[2] else None
  if subsampling is None:
    raise JpegFileError(
      f"Sampling factors {factors}; only {' and '.join(SUBSAMPLINGS)} can be read."
    )
  return JpegImage(components, tables, size, subsampling)
