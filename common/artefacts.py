"""Exported models: one file that compresses and decodes without the run that it comes from.

A `.ntcm` file is a zip archive by numpy's conventions (`numpy.load` reads it, nothing is pickled):

| member | what |
|---|---|
| `model.json` | family, config, fingerprint, training; types, shape and SHA-256 of each array |
| `weights/<path>.npy` | a variable of the codec, named by its path in the codec |
| `coding/<name>.npy` | what decoding derives from the weights: `TrainableCodec.derive_coding` |
| the comment | `ntcm sha256 ` and the SHA-256, in hexadecimal, of all bytes before it |

Arrays are stored in the narrowest type that holds all their numbers exactly; weights that were
rounded to 16 bits (`round_weights`) take half the room. Members are stored without compression,
under one fixed date: the same model gives the same bytes, and no member is larger than the file.
Nothing is believed before the SHA-256 holds; no array is read before its size is what the model
needs. The SHA-256 tells damage, not whom a file is from.

Importing this module and reading `model.json` needs no TensorFlow.
"""

import dataclasses
import hashlib
import io
import json
import math
import pathlib
import platform
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from common import hyper, runs
from common.bitstream import FINGERPRINT_BYTES

if TYPE_CHECKING:
  from common.codec import BuildCodec, TrainableCodec

SUFFIX = ".ntcm"
SCHEMA_VERSION = 4  # 4: all layers of an integer hyper-synthesis are alike.

# What a model says of its training: nothing of the machine.
TRAINING_FACTS = ("xid", "wid", "runname", "commit", "dirty")

# Larger files are refused; a zip archive of the plain kind, without 64-bit fields, holds that much.
MAX_BYTES = (1 << 31) - 1
MAX_JSON_BYTES = 1 << 24

# A config may build so many times the weights that its file holds (one of a decoder alone lacks the
# encoder's), or so many in any case; beyond that it is refused before they are allocated.
_BUILT_PER_HELD = 16
_BUILT_AT_LEAST = 1 << 20

_MODEL = "model.json"
_SEAL = b"ntcm sha256 "
_SEAL_BYTES = len(_SEAL) + 64
_DATE = (1980, 1, 1, 0, 0, 0)  # The earliest that a zip archive knows.
_DTYPES = (
  "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32",
  "float64",
)  # fmt: skip
# What arrays may be stored as, narrowest first.
_NARROWER = {
  **{f"int{bits}": ("int8", "int16", "int32") for bits in (16, 32, 64)},
  **{f"uint{bits}": ("uint8", "uint16", "uint32") for bits in (16, 32, 64)},
  "float32": ("float16",),
}
_PACKAGES = ("numpy", "tensorflow", "tensorflow-compression")

# What reading a zip archive raises where it is none, beside ArtefactError.
_ZIP_ERRORS = (
  zipfile.BadZipFile, ValueError, KeyError, OSError, EOFError, NotImplementedError, RuntimeError,
  OverflowError, MemoryError, struct.error,
)  # fmt: skip


class ArtefactError(RuntimeError):
  """A file is no exported model, or cannot be used as asked; the message says why."""


@dataclasses.dataclass(frozen=True)
class Artefact:
  """An exported model whose bytes hold; its arrays are read when they are asked for.

  Attributes:
    name: For messages: where it was read from.
    data: The whole file.
    model: `model.json`.
  """

  name: str
  data: bytes
  model: dict[str, Any]

  @property
  def family(self) -> str:
    """The entropy-model folder."""
    return self.model["family"]

  @property
  def fingerprint(self) -> bytes:
    """Of the files that it writes and decodes."""
    return bytes.fromhex(self.model["fingerprint"])

  @property
  def decoder_only(self) -> bool:
    """Whether the weights that only compressing needs were left out."""
    return self.model["decoder_only"]

  def check_encoder(self) -> None:
    """Raises ArtefactError if it can only decode."""
    if self.decoder_only:
      raise ArtefactError(
        f"{self.name} was exported with --decoder_only: it cannot compress. Compress with the run, "
        "or export it again without --decoder_only."
      )

  def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
    """Of the arrays of a group, "weights" or "coding", by name within the group."""
    return {
      name[len(group) + 1 :]: tuple(facts["shape"])
      for name, facts in self.model["arrays"].items()
      if name.startswith(f"{group}/")
    }

  def num_bytes(self, group: str) -> int:
    """Of a group's arrays together, as they are stored."""
    arrays = {k: v for k, v in self.model["arrays"].items() if k.startswith(f"{group}/")}
    return sum(math.prod(a["shape"]) * np.dtype(a["stored"]).itemsize for a in arrays.values())

  def arrays(self, group: str) -> dict[str, np.ndarray]:
    """A group's arrays by name within the group.

    Raises:
      ArtefactError: An array is not what `model.json` announces.
    """
    try:
      with zipfile.ZipFile(io.BytesIO(self.data)) as archive:
        return {name: self._array(archive, f"{group}/{name}") for name in self.shapes(group)}
    except _ZIP_ERRORS as e:
      if isinstance(e, ArtefactError):
        raise
      raise ArtefactError(f"{self.name} is damaged or hostile ({e}).") from e

  def _array(self, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    facts = self.model["arrays"][name]
    member = archive.read(f"{name}.npy")
    if hashlib.sha256(member).hexdigest() != facts["sha256"]:
      raise ArtefactError(f"{self.name}: the SHA-256 of {name} does not hold: damaged.")
    shape, dtype = tuple(facts["shape"]), np.dtype(facts["stored"])
    start = 10 + int.from_bytes(member[8:10], "little")
    # Compared with what it must be, not parsed: numpy's parser was not made for hostile headers.
    # Numpy's versions differ in the blanks at its end only.
    descr = dtype.newbyteorder("<").str
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    size = math.prod(shape) * dtype.itemsize
    if (
      member[:8] != b"\x93NUMPY\x01\x00"
      or member[10:start].rstrip() != header
      or len(member) != start + size
    ):
      raise ArtefactError(f"{self.name}: {name} is not the array that {_MODEL} announces.")
    return np.frombuffer(member, descr, offset=start).astype(facts["dtype"]).reshape(shape)


def dumps(
  codec: "TrainableCodec",
  family: str,
  model_config: Mapping[str, Any],
  step: int,
  training: Mapping[str, Any],
  decoder_only: bool = False,
) -> bytes:
  """A trained codec as a file's bytes. Prepares the codec.

  Args:
    codec: With the weights to export.
    family: The folder whose `build` made it.
    model_config: What `build` made it from; JSON can hold it.
    step: Of the training.
    training: `eval_lib.run_facts`; TRAINING_FACTS of them are taken along.
    decoder_only: Whether to leave out what decoding does not need.
  """
  coding = codec.derive_coding()
  codec.prepare(coding)
  named = {f"weights/{k}": v.numpy() for k, v in _wanted(codec, decoder_only).items()}
  named.update({f"coding/{name}": np.asarray(array) for name, array in coding.items()})
  members, arrays = {}, {}
  for name, array in sorted(named.items()):
    if array.dtype.name not in _DTYPES or not (name.isascii() and name.isprintable()):
      raise ValueError(f"The array {name!r} of type {array.dtype} cannot be exported.")
    stream = io.BytesIO()
    stored = _narrowest(array)
    little = array.astype(stored.newbyteorder("<"), order="C")
    np.lib.format.write_array(stream, little, version=(1, 0), allow_pickle=False)
    members[f"{name}.npy"] = stream.getvalue()
    arrays[name] = {
      "dtype": array.dtype.name,
      "stored": stored.name,
      "shape": list(array.shape),
      "sha256": hashlib.sha256(members[f"{name}.npy"]).hexdigest(),
    }
  model = {
    "schema_version": SCHEMA_VERSION,
    "family": family,
    "fingerprint": codec.fingerprint.hex(),
    "decoder_only": decoder_only,
    "model_config": dict(model_config),
    "step": step,
    "training": {key: training.get(key) for key in TRAINING_FACTS},
    "versions": _versions(),
    "arrays": arrays,
  }
  return seal({_MODEL: (json.dumps(model, indent=1, allow_nan=False) + "\n").encode(), **members})


def round_weights(codec: "TrainableCodec") -> None:
  """Rounds the codec's weights to 16-bit floating point, before it is exported: half the room.

  The rounded codec is another model, with a fingerprint of its own; by PSNR it is within 0.01 dB
  where that was measured (docs/results.md).

  Raises:
    ArtefactError: A weight is too large for 16 bits.
  """
  for name, variable in named_variables(codec).items():
    if variable.dtype.name == "float32":
      with np.errstate(over="ignore"):
        rounded = variable.numpy().astype(np.float16).astype(np.float32)
      if not np.all(np.isfinite(rounded)):
        raise ArtefactError(f"{name} has weights beyond 65,504: export it without --half.")
      variable.assign(rounded)


def _narrowest(array: np.ndarray) -> np.dtype:
  """The narrowest type that holds all of an array's numbers exactly."""
  for name in _NARROWER.get(array.dtype.name, ()):
    with np.errstate(over="ignore", invalid="ignore"):
      same = np.array_equal(array.astype(name).astype(array.dtype), array)
    if same and np.dtype(name).itemsize < array.dtype.itemsize:
      return np.dtype(name)
  return array.dtype


def default_name(family: str, runname: str, fingerprint: bytes, decoder_only: bool = False) -> str:
  """The file name of an export: "factorized-rd_lambda=0.01-a1b2c3d4e5f6.ntcm"."""
  end = "-decoder" if decoder_only else ""
  return f"{family}-{runname}-{fingerprint.hex()}{end}{SUFFIX}"


def seal(members: Mapping[str, bytes]) -> bytes:
  """The archive of these members, with its SHA-256 at the end. Its bytes depend on them alone.

  Raises:
    ArtefactError: They are more than MAX_BYTES.
  """
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
    for name, content in members.items():
      info = zipfile.ZipInfo(name, _DATE)
      info.create_system = 3  # Unix, wherever it is made.
      info.external_attr = 0o644 << 16
      archive.writestr(info, content)
    archive.comment = _SEAL + bytes(64)
  body = stream.getvalue()[:-64]
  if len(body) + 64 > MAX_BYTES:
    raise ArtefactError(f"The model takes {len(body)} bytes; an exported one at most {MAX_BYTES}.")
  return body + hashlib.sha256(body).hexdigest().encode()


def read(path: runs.PathLike) -> Artefact:
  """An exported model, checked whole; no TensorFlow is imported.

  Raises:
    ArtefactError: It is none, or is damaged, truncated, hostile, or of another version.
    OSError: The file cannot be read.
  """
  path = pathlib.Path(path)
  _checked_size(path)
  return loads(path.read_bytes(), str(path))


def loads(data: bytes, name: str = "The model") -> Artefact:
  """`read`, of bytes; `name` is for messages."""
  if data[-_SEAL_BYTES:-64] != _SEAL:
    raise ArtefactError(
      f"{name} is no exported model ({SUFFIX}), or it is truncated. Export it again: "
      "./ntc.py export RUN"
    )
  if hashlib.sha256(memoryview(data)[:-64]).hexdigest().encode() != data[-64:]:
    raise ArtefactError(
      f"The SHA-256 of {name} does not hold: the file is damaged. Export it again: "
      "./ntc.py export RUN"
    )
  try:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      model = _read_model(archive, len(data), name)
      _check_arrays(archive, model, name)
  except _ZIP_ERRORS as e:
    if isinstance(e, ArtefactError):
      raise
    raise ArtefactError(f"{name} is damaged or hostile ({e}).") from e
  return Artefact(name, data, model)


def peek(path: runs.PathLike) -> dict[str, Any]:
  """The `model.json` of a file; nothing else of it is read or checked.

  Raises:
    ArtefactError, OSError: As `read`, as far as this shows.
  """
  path = pathlib.Path(path)
  size = _checked_size(path)
  try:
    with zipfile.ZipFile(path) as archive:
      return _read_model(archive, size, str(path))
  except _ZIP_ERRORS as e:
    if isinstance(e, ArtefactError):
      raise
    raise ArtefactError(f"{path} is no exported model, or it is damaged ({e}).") from e


def find(folder: runs.PathLike, fingerprint: bytes) -> tuple[list[pathlib.Path], list[str]]:
  """The exported models in a folder that decode a fingerprint's files, by name.

  Returns:
    Their paths, and what is wrong with files that cannot be read.
  """
  found, wrong = [], []
  for path in sorted(pathlib.Path(folder).glob(f"*{SUFFIX}")):
    try:
      if peek(path)["fingerprint"] == fingerprint.hex():
        found.append(path)
    except (ArtefactError, OSError) as e:
      wrong.append(str(e))
  return found, wrong


def load(artefact: Artefact, build: "BuildCodec", encoder: bool = True) -> "TrainableCodec":
  """The codec, ready to decode and, with `encoder`, to compress.

  The coding state is the exported one: nothing is derived from the weights on this machine.

  Args:
    artefact: Of `read` or `loads`.
    build: Of its family.
    encoder: Whether it has to compress as well.

  Raises:
    ArtefactError: It was exported without the encoder, or is not what `build` makes; arrays that
      are missing, unknown or of another shape are named.
  """
  if encoder:
    artefact.check_encoder()
  import tensorflow as tf

  from common import layers

  made_by = f"It was made at commit {artefact.model['training'].get('commit')}"
  held = sum(math.prod(shape) for shape in artefact.shapes("weights").values())
  try:
    with layers.at_most(max(_BUILT_AT_LEAST, _BUILT_PER_HELD * held)):
      codec = build(hyper.to_config(artefact.model["model_config"]))
  except (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
    RecursionError, MemoryError, tf.errors.OpError,
  ) as e:  # fmt: skip
    raise ArtefactError(
      f"{artefact.name}: this code cannot build its model ({type(e).__name__}: {e}). {made_by}."
    ) from e
  variables = _wanted(codec, artefact.decoder_only)
  wanted = {name: (tuple(v.shape), v.dtype.name) for name, v in variables.items()}
  saved = {
    name: (shape, artefact.model["arrays"][f"weights/{name}"]["dtype"])
    for name, shape in artefact.shapes("weights").items()
  }
  wrong = [
    f"{name} ({'missing' if name not in saved else 'unknown' if name not in wanted else 'differs'})"
    for name in sorted(set(wanted) | set(saved))
    if wanted.get(name) != saved.get(name)
  ]
  if wrong:
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    raise ArtefactError(
      f"The weights in {artefact.name} do not fit the model of this code: {', '.join(wrong[:5])}"
      f"{more}. {made_by}."
    )
  for name, array in artefact.arrays("weights").items():
    variables[name].assign(array)
  try:
    codec.prepare(artefact.arrays("coding"))
  except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
    raise ArtefactError(
      f"The coding tables in {artefact.name} do not fit the model of this code "
      f"({type(e).__name__}: {e}). {made_by}."
    ) from e
  if codec.fingerprint != artefact.fingerprint:
    raise ArtefactError(
      f"{artefact.name} says that it is model {artefact.fingerprint.hex()}, but its arrays are "
      f"those of {codec.fingerprint.hex()}: it was edited, or this code computes otherwise. "
      f"{made_by}."
    )
  return codec


def write_arrays(path: runs.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
  """Arrays as a compressed `.npz`, whole or not at all."""
  stream = io.BytesIO()
  np.savez_compressed(stream, **arrays)
  runs.atomic_write(path, stream.getvalue())


def read_arrays(path: runs.PathLike) -> dict[str, np.ndarray]:
  """What `write_arrays` wrote.

  Raises:
    ArtefactError: The file is damaged.
    FileNotFoundError: There is none.
  """
  try:
    with np.load(path, allow_pickle=False) as archive:
      return {name: archive[name] for name in archive.files}
  except FileNotFoundError:
    raise
  except (*_ZIP_ERRORS, zlib.error) as e:
    raise ArtefactError(f"{path} is damaged ({e}). Remove it, and make it again.") from e


def named_variables(codec: "TrainableCodec") -> dict[str, Any]:
  """Every variable of the codec under its path in it: "synthesis/layers/0/kernel".

  A variable with several paths has the shortest one, of equally long ones the first by alphabet.
  """
  import tensorflow as tf

  paths: dict[int, tuple[int, str]] = {}
  by_id = {}
  for parts, variable in codec._flatten(
    predicate=lambda leaf: isinstance(leaf, tf.Variable), with_path=True
  ):
    path = (len(parts), "/".join(str(part) for part in parts))
    paths[id(variable)] = min(path, paths.get(id(variable), path))
    by_id[id(variable)] = variable
  named = {paths[key][1]: variable for key, variable in by_id.items()}
  if len(named) != len(by_id):
    raise ValueError("Two variables of this codec have one path: name its attributes otherwise.")
  return dict(sorted(named.items()))


def _wanted(codec: "TrainableCodec", decoder_only: bool) -> dict[str, Any]:
  """The variables that are exported."""
  decoder = {id(v) for v in codec.decoder_variables}
  return {
    name: variable
    for name, variable in named_variables(codec).items()
    if not decoder_only or id(variable) in decoder
  }


def _checked_size(path: pathlib.Path) -> int:
  size = path.stat().st_size
  if size > MAX_BYTES:
    raise ArtefactError(f"{path} has more than {MAX_BYTES} bytes: no exported model.")
  return size


def _read_model(archive: zipfile.ZipFile, size: int, name: str) -> dict[str, Any]:
  """`model.json` of an archive of `size` bytes, checked."""
  infos = archive.infolist()
  names = [info.filename for info in infos]
  stored = all(
    info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    for info in infos
  )
  # Members that share bytes would be more together than the file is.
  if not stored or sum(i.file_size for i in infos) > size or len(set(names)) != len(names):
    raise ArtefactError(f"{name} has members that no exported model has: hostile.")
  if _MODEL not in names:
    raise ArtefactError(f"{name} has no {_MODEL}: no exported model.")
  if archive.getinfo(_MODEL).file_size > MAX_JSON_BYTES:
    raise ArtefactError(f"{name}: {_MODEL} has more than {MAX_JSON_BYTES} bytes: hostile.")
  try:
    model = json.loads(archive.read(_MODEL))
  except (ValueError, RecursionError) as e:
    raise ArtefactError(f"{name}: {_MODEL} is not JSON: damaged or hostile.") from e
  version = model.get("schema_version") if isinstance(model, dict) else None
  if version != SCHEMA_VERSION:
    raise ArtefactError(
      f"{name} has schema version {version!r}; this code reads {SCHEMA_VERSION}. "
      "Use the code that wrote it, or export the run again."
    )
  if not _is_model(model):
    raise ArtefactError(f"{name}: {_MODEL} lacks fields or has wrong ones: damaged or hostile.")
  return model


def _is_model(model: Mapping[str, Any]) -> bool:
  types = {"family": str, "fingerprint": str, "decoder_only": bool, "model_config": dict,
           "step": int, "training": dict, "versions": dict, "arrays": dict}  # fmt: skip
  if not all(isinstance(model.get(key), kind) for key, kind in types.items()):
    return False
  try:
    if len(bytes.fromhex(model["fingerprint"])) != FINGERPRINT_BYTES:
      return False
  except ValueError:
    return False
  return all(
    isinstance(facts, dict)
    and facts.get("dtype") in _DTYPES
    and facts.get("stored") in (facts["dtype"], *_NARROWER.get(facts["dtype"], ()))
    and np.dtype(facts["stored"]).itemsize <= np.dtype(facts["dtype"]).itemsize
    and isinstance(facts.get("sha256"), str)
    and isinstance(facts.get("shape"), list)
    and all(type(side) is int and 0 <= side <= MAX_BYTES for side in facts["shape"])
    for facts in model["arrays"].values()
  )


def _check_arrays(archive: zipfile.ZipFile, model: Mapping[str, Any], name: str) -> None:
  """The members are the arrays that `model.json` announces, as far as their sizes show."""
  there = {info.filename: info.file_size for info in archive.infolist()}
  wanted = {f"{array}.npy" for array in model["arrays"]} | {_MODEL}
  if set(there) != wanted:
    odd = sorted(set(there) ^ wanted)
    raise ArtefactError(f"{name}: {_MODEL} and the members differ in {', '.join(odd[:5])}.")
  for array, facts in model["arrays"].items():
    if not array.startswith(("weights/", "coding/")):
      raise ArtefactError(f"{name}: the array {array} is of no known group.")
    if math.prod(facts["shape"]) * np.dtype(facts["stored"]).itemsize > there[f"{array}.npy"]:
      raise ArtefactError(f"{name}: {array} is smaller than {_MODEL} announces: hostile.")


def _versions() -> dict[str, str]:
  from importlib import metadata

  found = {"python": platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:  # tensorflow-cpu, for example.
      continue
  return found
