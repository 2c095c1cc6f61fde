"""Damaged and hostile files: each is refused, or decodes to the right picture. Nothing else.

    python -m tests.fuzz_decode --number 100000 --seed 0 [--family mshyper] [--first 4711]

Files are made from valid ones of tiny models, whose weights come from seeds: file `i` depends on
the seed and on `i` alone, and a failure says how to make it again. tests/corpus/ holds hostile
files, and a few valid ones, that depend on no weights (--make_corpus writes them). `TestOneInput`
is a libFuzzer target: the first byte chooses the family.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import functools
import io
import json
import pathlib
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from typing import Any, Callable, Optional

import numpy as np

from benchmarks import memory
from common import artefacts, bitstream, entropy, rd
from common.artefacts import ArtefactError
from common.bitstream import BitstreamError
from tests.conftest import TINY_MODELS, picture

FAMILIES = ("factorized", "vbq", "mshyper", "ljpeg", "ntcm")
CORPUS = pathlib.Path(__file__).parent / "corpus"
SIZES = ((40, 56), (7, 5), (33, 64))
SECONDS = 1.0  # Of processor time, for one file.
HANG_SECONDS = 60


class Wrong(AssertionError):
  """A promise was broken; the message says how."""


@dataclasses.dataclass
class Target:
  """What is attacked.

  Attributes:
    valid: Whole files.
    check: Takes any bytes; returns "refused" or "right", or raises.
    mutators: Name -> (random, target) to a file.
  """

  valid: list[bytes]
  check: Callable[[bytes], str]
  mutators: dict[str, Callable[[np.random.Generator, "Target"], bytes]]


# --- Mutators ------------------------------------------------------------------------------------


def _any(random: np.random.Generator, files: list[bytes]) -> bytes:
  return files[random.integers(len(files))]


def _flip(random: np.random.Generator, data: bytes) -> bytes:
  out = bytearray(data)
  for _ in range(random.integers(1, 9)):
    if out:
      out[random.integers(len(out))] ^= 1 << int(random.integers(8))
  return bytes(out)


def _truncate(random: np.random.Generator, data: bytes) -> bytes:
  return data[: random.integers(len(data) + 1)]


def _insert(random: np.random.Generator, data: bytes) -> bytes:
  at = random.integers(len(data) + 1)
  size = int(random.integers(1, 40))
  fill = random.integers(256)
  more = random.bytes(size) if random.random() < 0.5 else bytes([fill]) * size
  return data[:at] + more + data[at:]


def _delete(random: np.random.Generator, data: bytes) -> bytes:
  at = random.integers(len(data) + 1)
  return data[:at] + data[at + int(random.integers(1, 40)) :]


def _replace(random: np.random.Generator, data: bytes) -> bytes:
  at = random.integers(len(data) + 1)
  size = int(random.integers(1, 9))
  return data[:at] + bytes([random.choice([0, 1, 127, 128, 255])]) * size + data[at + size :]


def _random(random: np.random.Generator, data: bytes) -> bytes:
  return random.bytes(int(random.integers(2 * len(data) + 1)))


_BLIND = {
  "flip": _flip,
  "truncate": _truncate,
  "insert": _insert,
  "delete": _delete,
  "replace": _replace,
  "random": _random,
}


def _splice(random: np.random.Generator, a: bytes, b: bytes) -> bytes:
  return a[: random.integers(len(a) + 1)] + b[random.integers(len(b) + 1) :]


def _mutate(random: np.random.Generator, data: bytes) -> bytes:
  names = list(_BLIND)
  return _BLIND[names[random.integers(len(names))]](random, data)


def _blind_mutators() -> dict[str, Callable[[np.random.Generator, Target], bytes]]:
  made: dict[str, Callable[[np.random.Generator, Target], bytes]] = {
    name: lambda random, target, mutate=mutate: mutate(random, _any(random, target.valid))
    for name, mutate in _BLIND.items()
  }
  made["splice"] = lambda random, target: _splice(
    random, _any(random, target.valid), _any(random, target.valid)
  )
  return made


# --- The container -------------------------------------------------------------------------------


def sealed(stream: bitstream.Bitstream) -> bytes:
  """The file of a stream with right checksums, whatever size it claims."""
  check = bitstream.check_size
  bitstream.check_size = lambda height, width: None
  try:
    return bitstream.write(stream)
  finally:
    bitstream.check_size = check


def _stream(random: np.random.Generator, target: Target) -> bitstream.Bitstream:
  return bitstream.read(_any(random, target.valid))


def _with_section(
  random: np.random.Generator, stream: bitstream.Bitstream, mutate: Callable[[bytes], bytes]
) -> bitstream.Bitstream:
  sections = list(stream.sections)
  at = random.integers(len(sections))
  sections[at] = mutate(sections[at])
  return dataclasses.replace(stream, sections=tuple(sections))


def _sealed_section(random: np.random.Generator, target: Target) -> bytes:
  stream = _stream(random, target)
  return sealed(_with_section(random, stream, lambda s: _mutate(random, s)))


def _sealed_head(random: np.random.Generator, target: Target) -> bytes:
  """The first bytes of a section: lengths of overflows, numbers of rates."""

  def mutate(section: bytes) -> bytes:
    number = int(random.choice([0, 1, 2, 15, 16, 127, 128, 300, 2**20, 2**28, 2**34]))
    return bitstream.varint(number) + section[int(random.integers(4)) :]

  return sealed(_with_section(random, _stream(random, target), mutate))


def _sealed_splice(random: np.random.Generator, target: Target) -> bytes:
  a, b = _stream(random, target), _stream(random, target)
  if random.random() < 0.3:  # Whole sections of another file.
    return sealed(dataclasses.replace(a, sections=b.sections))
  other = b.sections[random.integers(len(b.sections))]
  return sealed(_with_section(random, a, lambda s: _splice(random, s, other)))


def _sealed_count(random: np.random.Generator, target: Target) -> bytes:
  stream = _stream(random, target)
  sections = [_any(random, list(stream.sections)) for _ in range(random.integers(1, 17))]
  return sealed(dataclasses.replace(stream, sections=tuple(sections)))


_SIDES = (0, 1, 2, 15, 17, 63, 65, 500, 1000, 4096, 11_500, 2**17, 2**20, 2**27, 2**27 + 1, 2**34)


def _sealed_size(random: np.random.Generator, target: Target) -> bytes:
  stream = _stream(random, target)
  height, width = (
    int(random.choice(_SIDES)) if random.random() < 0.7 else side
    for side in (stream.height, stream.width)
  )
  stream = dataclasses.replace(stream, height=height, width=width)
  if random.random() < 0.3:
    stream = _with_section(random, stream, lambda s: bytes(random.integers(40)))
  return sealed(stream)


def _sealed_lengths(random: np.random.Generator, target: Target) -> bytes:
  """A header that claims other lengths or numbers, its own checksum right."""
  stream = _stream(random, target)
  header = bytearray(b"NTC" + bytes([bitstream.FORMAT_VERSION, len(stream.family)]))
  header += stream.family.encode()
  header += stream.fingerprint + bitstream.varint(stream.height) + bitstream.varint(stream.width)
  header.append(int(random.choice([0, 1, 2, 3, 16, 17, 255])))
  for section in stream.sections:
    claimed = int(random.choice([0, len(section), 2**31, 2**32, 2**35 - 1]))
    header += bitstream.varint(claimed) + entropy.zlib.crc32(section).to_bytes(4, "little")
  header += stream.symbols_crc.to_bytes(4, "little")
  header += entropy.zlib.crc32(header).to_bytes(4, "little")
  return bytes(header) + b"".join(stream.sections)


@contextlib.contextmanager
def _recorded(crcs: list[int]) -> Iterator[None]:
  """Keeps what `entropy.symbols_crc` gives."""
  original = entropy.symbols_crc

  def record(symbols: np.ndarray, crc: int = 0) -> int:
    crcs.append(original(symbols, crc))
    return crcs[-1]

  entropy.symbols_crc = record
  try:
    yield
  finally:
    entropy.symbols_crc = original


def _all_right(random: np.random.Generator, target: Target, codec: Any) -> bytes:
  """A section of other symbols, and their checksum made right too: as good as a valid file."""
  stream = _with_section(random, _stream(random, target), lambda s: _mutate(random, s))
  crcs: list[int] = []
  with _recorded(crcs), contextlib.suppress(BitstreamError):
    codec.unpack(sealed(stream))
  return sealed(dataclasses.replace(stream, symbols_crc=crcs[-1] if crcs else 0))


def _check_container(data: bytes, codec: Any, known: dict[Any, np.ndarray]) -> str:
  try:
    decoded = codec.decompress(data)
  except BitstreamError:
    return "refused"
  stream = bitstream.read(data)
  if decoded.dtype != np.uint8 or decoded.shape != (stream.height, stream.width, 3):
    raise Wrong(f"A picture {decoded.dtype} {decoded.shape} of a file of {stream}.")
  original = known.get((stream.symbols_crc, stream.height, stream.width))
  if original is not None:
    if not np.array_equal(decoded, original):
      raise Wrong("Symbols of a valid file, and another picture.")
    return "right"
  # The file's checksum is that of other symbols: whoever made it, meant them. They code again to
  # the same symbols, and those to the same picture.
  decode, size = codec.unpack(data)
  again, _ = codec.unpack(data)
  if any(not np.array_equal(decode[k], again[k]) for k in decode):
    raise Wrong("Decoding twice gives two results.")
  if not np.array_equal(rd.reconstruct(codec, decode, size), decoded):
    raise Wrong("The picture is not that of the symbols.")
  return "right"


def _container(codec: Any) -> Target:
  valid = [codec.compress(picture(*size, seed=i)) for i, size in enumerate(SIZES)]
  if codec.num_rates > 1:
    codec.rate_index = codec.num_rates - 1
    valid.append(codec.compress(picture(*SIZES[0])))
  known = {}
  for data in valid:
    stream = bitstream.read(data)
    known[stream.symbols_crc, stream.height, stream.width] = codec.decompress(data)
  return Target(
    valid,
    lambda data: _check_container(data, codec, known),
    {
      **_blind_mutators(),
      "sealed section": _sealed_section,
      "sealed head": _sealed_head,
      "sealed splice": _sealed_splice,
      "sealed count": _sealed_count,
      "sealed size": _sealed_size,
      "sealed lengths": _sealed_lengths,
      "all right": lambda random, target: _all_right(random, target, codec),
    },
  )


# --- The tiny models -----------------------------------------------------------------------------


def _built(family: str, file: str, values: dict[str, Any]) -> Any:
  import importlib

  import tensorflow as tf

  from common import hyper

  tf.keras.utils.set_random_seed(0)
  config = hyper.load(file).get_config()
  hyper.set_values(config, {f"model_config.{k}": v for k, v in values.items()})
  codec = importlib.import_module(f"{family}.codec").build(config.model_config)
  return codec, config.model_config


def _tiny(family: str) -> tuple[Any, Any]:
  codec, config = _built(family, *TINY_MODELS[family])
  codec.calibrate(rd.to_batch(picture(64, 64)))
  codec.prepare()
  return codec, config


def _factorized() -> Target:
  return _container(_tiny("factorized")[0])


def _mshyper() -> Target:
  return _container(_tiny("mshyper")[0])


def _vbq() -> Target:
  from factorized import vbq

  values = {
    "analysis.num_filters": 6,
    "analysis.output_channels": 12,
    "synthesis.num_filters": 6,
    "synthesis.in_channels": 6,
  }
  codec, _ = _built("factorized", "factorized/configs/bls2017_vae.py:tiny", values)
  codec.calibrate(rd.to_batch(picture(64, 64)))
  samples = vbq.samples_of(codec, [picture(96, 96)])
  codec.prepare(vbq.build_vbq(samples, lambdas=[4.0, 0.1], max_bits=5).arrays())
  return _container(codec)


# --- JPEG files ----------------------------------------------------------------------------------


def _jpeg_segments(data: bytes) -> list[tuple[int, int, int]]:
  """(marker, first byte of its content, end) of each segment up to the scan."""
  found, at = [], 2
  while at + 4 <= len(data) and data[at] == 0xFF:
    size = int.from_bytes(data[at + 2 : at + 4], "big")
    found.append((data[at + 1], at + 4, at + 2 + size))
    if data[at + 1] == 0xDA:
      break
    at += 2 + size
  return found


def _jpeg_size(random: np.random.Generator, target: Target) -> bytes:
  data = bytearray(_any(random, target.valid))
  for marker, begin, _ in _jpeg_segments(bytes(data)):
    if marker in (0xC0, 0xC1, 0xC2):
      for at in (begin + 1, begin + 3):
        if random.random() < 0.7:
          side = int(random.choice([0, 1, 8, 9, 100, 1000, 4096, 11_000, 65_500, 65_535]))
          data[at : at + 2] = side.to_bytes(2, "big")
  return bytes(data)


def _jpeg_segment(random: np.random.Generator, target: Target) -> bytes:
  """Bytes within a segment (tables, codes, frame), lengths as they are."""
  data = bytearray(_any(random, target.valid))
  segments = _jpeg_segments(bytes(data))
  _, begin, end = segments[random.integers(len(segments))]
  for _ in range(random.integers(1, 4)):
    if end > begin:
      data[random.integers(begin, end)] = random.integers(256)
  return bytes(data)


def _jpeg_scan(random: np.random.Generator, target: Target) -> bytes:
  data = _any(random, target.valid)
  end = _jpeg_segments(data)[-1][2]
  return data[:end] + _mutate(random, data[end:-2]).replace(b"\xff", b"\xff\0") + data[-2:]


def _jpeg_order(random: np.random.Generator, target: Target) -> bytes:
  """Segments left out, repeated, or in another order; of two files."""
  data = _any(random, target.valid)
  parts = [data[b - 4 : e] for _, b, e in _jpeg_segments(data)]
  parts += [p for d in target.valid[:1] for p in [d[b - 4 : e] for _, b, e in _jpeg_segments(d)]]
  end = _jpeg_segments(data)[-1][2]
  chosen = [parts[i] for i in random.permutation(len(parts))[: random.integers(1, len(parts) + 1)]]
  return data[:2] + b"".join(chosen) + data[end:]


def _check_jpeg(data: bytes, codec: Any) -> str:
  results = []
  size = None
  try:
    decoded = codec.decompress(data)
    size = decoded.shape[:2]
    results.append("right")
    if decoded.dtype != np.uint8 or decoded.ndim != 3 or decoded.shape[2] != 3:
      raise Wrong(f"A picture {decoded.dtype} {decoded.shape}.")
  except BitstreamError:
    results.append("refused")
  try:
    decode, found = codec.unpack(data)
    if found != size:
      raise Wrong(f"unpack says {found}, decompress {size}.")
    from ljpeg import jpeg_file

    for i, name in enumerate(("y", "cb", "cr")):
      rows, cols = jpeg_file.grid(found, codec._subsampling, i)
      if not rows <= decode[name].shape[1] <= rows + 1 or decode[name].shape[2] < cols:
        raise Wrong(f"{name} has the shape {decode[name].shape} in a picture {found}.")
    results.append("right")
  except BitstreamError:
    results.append("refused")
  # JPEG has no checksums: what is not refused is right by what decoders show.
  return "right" if "right" in results else "refused"


def _ljpeg() -> Target:
  codec, _ = _built("ljpeg", "ljpeg/configs/ljpeg.py:tiny", {"search": "", "coefficients": "round"})
  codec.prepare()
  valid = [codec.compress(picture(*size, seed=i)) for i, size in enumerate(SIZES)]
  valid += [p.read_bytes() for p in sorted(CORPUS.glob("valid-*.jpg"))]
  return Target(
    valid,
    lambda data: _check_jpeg(data, codec),
    {
      **_blind_mutators(),
      "frame size": _jpeg_size,
      "segment": _jpeg_segment,
      "scan": _jpeg_scan,
      "order": _jpeg_order,
    },
  )


# --- Exported models -----------------------------------------------------------------------------


def _members(data: bytes) -> dict[str, bytes]:
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    return {info.filename: archive.read(info) for info in archive.infolist()}


def _model_bytes(random: np.random.Generator, target: Target) -> bytes:
  """Any bytes of the archive, and its SHA-256 made right."""
  body = _mutate(random, _any(random, target.valid)[:-64])
  return body + artefacts.hashlib.sha256(body).hexdigest().encode()


def _model_member(random: np.random.Generator, target: Target) -> bytes:
  """An array's bytes, and all checksums made right."""
  members = _members(_any(random, target.valid))
  model = json.loads(members["model.json"])
  names = sorted(model["arrays"])
  name = names[random.integers(len(names))]
  content = _mutate(random, members[f"{name}.npy"])
  members[f"{name}.npy"] = content
  model["arrays"][name]["sha256"] = artefacts.hashlib.sha256(content).hexdigest()
  members["model.json"] = json.dumps(model).encode()
  return artefacts.seal(members)


_VALUES = (None, True, -1, 0, 1, 2**31, 2**63, 1e308, "", "x" * 100, [], [2**31] * 4, [[1]], {},
           {"a": 1}, "00" * 6, "float32", "object", [0], [1, -1])  # fmt: skip


def _model_json(random: np.random.Generator, target: Target) -> bytes:
  """A field of model.json outside of model_config, all checksums made right."""
  members = _members(_any(random, target.valid))
  model = json.loads(members["model.json"])
  places: list[tuple[Any, Any]] = [(model, k) for k in model if k != "model_config"]
  for facts in model["arrays"].values():
    places += [(facts, k) for k in facts]
  where, key = places[random.integers(len(places))]
  if random.random() < 0.2:
    del where[key]
  else:
    where[key] = _VALUES[random.integers(len(_VALUES))]
  members["model.json"] = json.dumps(model).encode()
  return artefacts.seal(members)


def _model_names(random: np.random.Generator, target: Target) -> bytes:
  """Members left out, renamed, doubled, or compressed."""
  members = _members(_any(random, target.valid))
  names = sorted(members)
  name = names[random.integers(len(names))]
  content = members.pop(name)
  choice = random.integers(4)
  if choice == 1:
    members[["../x.npy", "weights/x.npy", "", "model.json/", "\0"][random.integers(5)]] = content
  elif choice == 2:
    members[name], members[f"{name}2"] = content, content
  elif choice == 3:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
      for key, value in {**members, name: content + bytes(1 << 20)}.items():
        archive.writestr(key, value)
      archive.comment = b"ntcm sha256 " + bytes(64)
    body = stream.getvalue()[:-64]
    return body + artefacts.hashlib.sha256(body).hexdigest().encode()
  return artefacts.seal(members)


def _ntcm() -> Target:
  from factorized.codec import build

  codec, config = _tiny("factorized")
  data = codec.compress(picture(*SIZES[0]))
  decoded = codec.decompress(data)
  valid = [
    artefacts.dumps(codec, "factorized", _plain(config), 1, {}, decoder_only)
    for decoder_only in (False, True)
  ]
  folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz"))

  def check(content: bytes) -> str:
    path = folder / "model.ntcm"
    path.write_bytes(content)
    with contextlib.suppress(ArtefactError):
      artefacts.peek(path)
    artefacts.find(folder, codec.fingerprint)
    path.unlink()
    try:
      model = artefacts.loads(content)
      if model.family != "factorized":  # ntc.py finds the family's folder, or says there is none.
        return "refused"
      loaded = artefacts.load(model, build, encoder=False)
    except ArtefactError:
      return "refused"
    # Other weights make another fingerprint, which the model has to say: then it is another model.
    if loaded.fingerprint == codec.fingerprint:
      if not np.array_equal(loaded.decompress(data), decoded):
        raise Wrong("A model of the same fingerprint decodes to another picture.")
      return "right"
    try:
      loaded.decompress(data)
    except BitstreamError:
      return "right"
    raise Wrong("Another model's file was decoded.")

  return Target(
    valid,
    check,
    {
      **_blind_mutators(),
      "sealed bytes": _model_bytes,
      "sealed array": _model_member,
      "sealed json": _model_json,
      "sealed members": _model_names,
    },
  )


def _plain(config: Any) -> Any:
  from common import hyper

  return hyper.plain(config)


# --- The corpus ----------------------------------------------------------------------------------


def corpus() -> dict[str, bytes]:
  """The files of tests/corpus: hostile ones, and JPEG files of other kinds than ours."""
  from PIL import Image

  files = {}
  image = Image.fromarray(picture(24, 40))
  for name, options in (
    ("progressive", {"progressive": True}),
    ("420", {"subsampling": "4:2:0"}),
    ("restarts", {"restart_marker_blocks": 2}),
  ):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=40, **options)
    files[f"valid-{name}.jpg"] = stream.getvalue()
  stream = io.BytesIO()
  image.convert("L").save(stream, "JPEG", quality=40)
  files["valid-grey.jpg"] = stream.getvalue()
  whole = files["valid-420.jpg"]
  frame = next(begin for marker, begin, _ in _jpeg_segments(whole) if marker == 0xC0)
  for name, sides in (("huge", (65500, 65500)), ("large", (11_000, 11_000)), ("empty", (0, 0))):
    sizes = b"".join(side.to_bytes(2, "big") for side in sides)
    files[f"hostile-{name}.jpg"] = whole[: frame + 1] + sizes + whole[frame + 5 :]
  files["hostile-no-scan.jpg"] = whole[: _jpeg_segments(whole)[-1][1] - 4] + b"\xff\xd9"
  files["odd-segment.jpg"] = whole[:2] + b"\xff\xe0\0\1" + whole[2:]
  stream_ = bitstream.Bitstream("factorized", bytes(6), 40, 56, (b"\0" * 8,), 0)
  for name, change in (
    ("huge", {"height": 2**27, "width": 2**27}),
    ("largest", {"height": 1, "width": 2**27}),
    ("empty", {"height": 0}),
    ("family", {"family": "../../etc/x"}),
    ("sections", {"sections": (b"",) * 16}),
  ):
    files[f"hostile-{name}.ntc"] = sealed(dataclasses.replace(stream_, **change))
  files["hostile-varint.ntc"] = (
    b"NTC" + bytes([bitstream.FORMAT_VERSION]) + b"\x01f" + bytes(6) + b"\xff" * 20
  )
  model = {"schema_version": artefacts.SCHEMA_VERSION, "family": "factorized",
           "fingerprint": "00" * 6, "decoder_only": False, "model_config": {}, "step": 0,
           "training": {}, "versions": {}, "arrays": {}}  # fmt: skip
  array = {"dtype": "float64", "stored": "float64", "shape": [2**31 - 1] * 3, "sha256": ""}
  for name, value in (
    ("config", model),
    ("shape", {**model, "arrays": {"weights/x": array}}),
    ("deep", {**model, "training": json.loads("[" * 500 + "]" * 500)}),
  ):
    members = {"model.json": json.dumps(value).encode()}
    if value["arrays"]:
      members["weights/x.npy"] = b"\x93NUMPY\x01\0"
    files[f"hostile-{name}.ntcm"] = artefacts.seal(members)
  files["hostile-none.ntcm"] = artefacts.seal({})
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr(zipfile.ZipInfo("model.json", (1980, 1, 1, 0, 0, 0)), bytes(1 << 20),
                     zipfile.ZIP_DEFLATED)  # fmt: skip
    archive.comment = b"ntcm sha256 " + bytes(64)
  body = buffer.getvalue()[:-64]
  files["hostile-bomb.ntcm"] = body + artefacts.hashlib.sha256(body).hexdigest().encode()
  return files


def families_of(name: str) -> tuple[str, ...]:
  """Which families a corpus file is for."""
  by_suffix = {".jpg": ("ljpeg",), ".ntcm": ("ntcm",), ".ntc": ("factorized", "vbq", "mshyper")}
  return by_suffix[pathlib.Path(name).suffix]


# --- Running -------------------------------------------------------------------------------------

_MAKERS = dict(zip(FAMILIES, (_factorized, _vbq, _mshyper, _ljpeg, _ntcm)))


@functools.cache
def target(family: str) -> Target:
  """One of FAMILIES, made the first time."""
  return _MAKERS[family]()


def check(family: str, data: bytes) -> str:
  """Decodes any bytes as a file of a family: "refused" or "right".

  Raises:
    Wrong: It decoded to something else. Any other exception is a broken promise too.
  """
  return target(family).check(data)


def make(family: str, seed: int, index: int) -> tuple[str, bytes]:
  """File `index` of a seed, and the mutator that made it."""
  random = np.random.default_rng([seed, index])
  mutators = target(family).mutators
  name = list(mutators)[index % len(mutators)]
  return name, mutators[name](random, target(family))


@dataclasses.dataclass
class Tally:
  """What came of a family's files, by mutator.

  Attributes:
    outcomes: (mutator, "refused", "right" or "wrong") -> how many.
    slowest: Seconds of one file.
    failures: How to make them again, and what was wrong.
  """

  outcomes: collections.Counter
  slowest: float = 0.0
  failures: list[str] = dataclasses.field(default_factory=list)


def run(family: str, number: int, seed: int = 0, first: int = 0, seconds: float = SECONDS) -> Tally:
  """Tries `number` files from `first` on."""
  tally = Tally(collections.Counter())
  began = time.monotonic()
  for data in target(family).valid:
    if check(family, data) != "right":
      raise Wrong(f"A valid file of {family} is refused.")
  for index in range(first, first + number):
    again = f"make({family!r}, {seed}, {index})"
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    name, data = make(family, seed, index)
    start = time.process_time()  # A busy machine is no slow decoder.
    try:
      outcome = check(family, data)
    except Exception as e:
      outcome = "wrong"
      tally.failures.append(f"{again} ({name}): {type(e).__name__}: {e}"[:300])
    taken = time.process_time() - start
    if taken > seconds:
      tally.failures.append(f"{again} ({name}): {taken:.1f} s")
    tally.slowest = max(tally.slowest, taken)
    tally.outcomes[name, outcome] += 1
    if sys.stderr.isatty() or (index + 1) % 5000 == 0:
      done = index + 1 - first
      rate = done / (time.monotonic() - began)
      print(f"{family} {done}/{number} {rate:.0f}/s {len(tally.failures)} wrong", file=sys.stderr)
  faulthandler.cancel_dump_traceback_later()
  return tally


def TestOneInput(data: bytes) -> None:
  """For libFuzzer (atheris.Setup(sys.argv, TestOneInput); atheris.Fuzz())."""
  if data:
    check(FAMILIES[data[0] % len(FAMILIES)], data[1:])


def table(tallies: dict[str, Tally]) -> str:
  """Markdown: a row a family and mutator."""
  lines = ["| family | files made by | tried | refused | decoded right | wrong |",
           "|---|---|---|---|---|---|"]  # fmt: skip
  for family, tally in tallies.items():
    for name in sorted({n for n, _ in tally.outcomes}, key=list(target(family).mutators).index):
      counts = [tally.outcomes[name, o] for o in ("refused", "right", "wrong")]
      lines.append(f"| {family} | {name} | {sum(counts)} | {' | '.join(map(str, counts))} |")
  return "\n".join(lines)


def main(argv: Optional[list[str]] = None) -> int:
  """The command line; returns 1 if a promise was broken."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--number", type=int, default=1000, help="files in all")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--first", type=int, default=0, help="number of the first file")
  parser.add_argument("--family", action="append", choices=FAMILIES)
  parser.add_argument("--seconds", type=float, default=SECONDS, help="processor time for a file")
  parser.add_argument("--make_corpus", action="store_true", help="write tests/corpus and end")
  args = parser.parse_args(argv)
  if args.make_corpus:
    for name, content in corpus().items():
      (CORPUS / name).write_bytes(content)
    return 0
  families = args.family or list(FAMILIES)
  began = time.monotonic()
  tallies = {
    f: run(f, args.number // len(families), args.seed, args.first, args.seconds) for f in families
  }
  print(table(tallies))
  peak = memory.peak() / 2**30
  for family, tally in tallies.items():
    print(f"{family}: slowest {1000 * tally.slowest:.0f} ms")
    for failure in tally.failures[:20]:
      print(f"  {failure}")
  print(f"{time.monotonic() - began:.0f} s, at most {peak:.2f} GB")
  return 1 if any(t.failures for t in tallies.values()) else 0


if __name__ == "__main__":
  sys.exit(main())
