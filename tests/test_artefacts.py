"""Exported models: whole, exact, honoured as they are, and refused where anything is wrong.

Every test of the fixture `codec` holds for each family in FAMILIES of tests/test_codec_contract.py.
"""

import dataclasses
import hashlib
import importlib
import io
import json
import subprocess
import sys
import time
import zipfile
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from common import artefacts, hyper
from common.artefacts import ArtefactError
from common.bitstream import BitstreamError
from tests.conftest import ROOT, picture
from tests.test_codec_contract import FAMILIES

FACTS = {"xid": "7", "wid": 3, "runname": "a", "commit": "c0ffee", "dirty": False, "workdir": "/x"}


@dataclasses.dataclass
class Exported:
  """An untrained codec with a prior that is no initial one, and its export."""

  family: str
  config: dict[str, Any]
  codec: Any
  data: bytes

  def build(self, config):
    return importlib.import_module(f"{self.family}.codec").build(config)

  def dumps(self, **arguments):
    return artefacts.dumps(self.codec, self.family, self.config, 12, FACTS, **arguments)


def _small(config):
  """The config with a sixteenth of all channels, so that thousands of bytes hold the model."""
  found = {}
  for key, value in config.items():
    is_channels = key in ("num_filters", "bottleneck_size") or key.endswith("channels")
    if isinstance(value, dict):
      value = _small(value)
    elif is_channels and isinstance(value, int) and value % 16 == 0:
      value //= 16
    found[key] = value
  return found


@pytest.fixture(scope="module", params=list(FAMILIES))
def exported(request):
  tf.keras.utils.set_random_seed(0)
  config = _small(hyper.load(FAMILIES[request.param]).get_config().model_config.to_dict())
  made = Exported(request.param, config, None, b"")
  made.codec = made.build(hyper.to_config(config))
  random = np.random.default_rng(0)
  for variable in made.codec.variables:
    variable.assign_add(random.normal(0, 0.01, variable.shape))
  made.data = made.dumps()
  return made


def _members(data):
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    return {name: archive.read(name) for name in archive.namelist()}


def _npy(array):
  stream = io.BytesIO()
  np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
  return stream.getvalue()


def _forged(data, change):
  """The export with `change(model.json as a dict, members)` applied, and right checksums again."""
  members = _members(data)
  model = json.loads(members.pop("model.json"))
  change(model, members)
  return artefacts.seal({"model.json": json.dumps(model).encode(), **members})


def _replace(name, array):
  """A change for `_forged`: another array under a name, announced as it is."""

  def change(model, members):
    members[f"{name}.npy"] = _npy(array)
    digest = hashlib.sha256(members[f"{name}.npy"]).hexdigest()
    model["arrays"][name] = {
      "dtype": array.dtype.name, "stored": array.dtype.name, "shape": list(array.shape),
      "sha256": digest,
    }  # fmt: skip

  return change


def _load(exported, data, **arguments):
  return artefacts.load(artefacts.loads(data), exported.build, **arguments)


# What an export holds


def test_arrays_are_stored_in_the_narrowest_type_and_come_back_as_they_were():
  for array, stored in [
    (np.array([-128, 127], np.int32), "int8"),
    (np.array([-129, 127], np.int64), "int16"),
    (np.array([0, 255], np.uint16), "uint8"),
    (np.array([1 << 40], np.int64), "int64"),
    (np.array([0.5, -2.0, 0.0], np.float32), "float16"),
    (np.array([0.1], np.float32), "float32"),
    (np.array([1e6], np.float32), "float32"),
    (np.array([1e-9], np.float32), "float32"),
    (np.array([0.5], np.float64), "float64"),
    (np.array([True]), "bool"),
    (np.zeros([0, 3], np.int32), "int8"),
  ]:
    assert artefacts._narrowest(array).name == stored, array


@pytest.mark.slow
def test_rounded_weights_take_half_the_room_and_are_a_model_of_their_own(exported):
  other = exported.build(hyper.to_config(exported.config))
  before = artefacts.named_variables(exported.codec)
  for name, variable in artefacts.named_variables(other).items():
    variable.assign(before[name])
  artefacts.round_weights(other)
  for name, variable in artefacts.named_variables(other).items():
    np.testing.assert_allclose(variable, before[name], rtol=1e-3, atol=1e-7)
  data = artefacts.dumps(other, exported.family, exported.config, 12, FACTS)
  whole, half = artefacts.loads(exported.data), artefacts.loads(data)
  assert half.num_bytes("weights") == pytest.approx(whole.num_bytes("weights") / 2, rel=0.01)
  assert half.fingerprint != whole.fingerprint
  loaded = _load(exported, data)
  image = picture(40, 56)
  file = other.compress(image)
  assert loaded.compress(image) == file
  np.testing.assert_array_equal(loaded.decompress(file), other.decompress(file))


def test_weights_that_16_bits_cannot_hold_are_refused(exported):
  other = exported.build(hyper.to_config(exported.config))
  variable = next(iter(artefacts.named_variables(other).values()))
  variable.assign(tf.fill(variable.shape, 1e6))
  with pytest.raises(ArtefactError, match="export it without --half"):
    artefacts.round_weights(other)


@pytest.mark.slow
def test_the_loaded_codec_writes_and_decodes_the_same_files(exported):
  loaded = _load(exported, exported.data)
  assert loaded is not exported.codec
  for size in [(1, 1), (7, 5), (40, 56)]:
    image = picture(*size)
    data = exported.codec.compress(image)
    assert loaded.compress(image) == data
    np.testing.assert_array_equal(loaded.decompress(data), exported.codec.decompress(data))


def test_every_variable_is_there_once_and_exact(exported):
  named = artefacts.named_variables(exported.codec)
  assert len(named) == len(exported.codec.variables)
  arrays = artefacts.loads(exported.data).arrays("weights")
  assert sorted(arrays) == sorted(named)
  for name, variable in named.items():
    assert arrays[name].tobytes() == variable.numpy().tobytes(), name
    assert arrays[name].dtype == variable.dtype.as_numpy_dtype


def test_paths_are_those_of_another_codec_of_the_same_config(exported):
  again = exported.build(hyper.to_config(exported.config))
  shapes = {k: v.shape for k, v in artefacts.named_variables(exported.codec).items()}
  assert {k: v.shape for k, v in artefacts.named_variables(again).items()} == shapes


def test_the_same_model_gives_the_same_bytes(exported, monkeypatch):
  monkeypatch.setattr(time, "time", lambda: 2e9)
  assert exported.dumps() == exported.data


def test_numpy_reads_it_and_nothing_is_pickled(exported):
  with np.load(io.BytesIO(exported.data), allow_pickle=False) as archive:
    coding = {k[len("coding/") :]: archive[k] for k in archive.files if k.startswith("coding/")}
  derived = exported.codec.derive_coding()
  assert sorted(coding) == sorted(derived)
  for name, array in derived.items():
    np.testing.assert_array_equal(coding[name], array)


def test_model_json_says_where_it_comes_from_and_nothing_of_the_machine(exported):
  model = json.loads(_members(exported.data)["model.json"])
  assert model["family"] == exported.family and model["step"] == 12
  assert model["model_config"] == json.loads(json.dumps(exported.config))
  assert model["fingerprint"] == exported.codec.fingerprint.hex()
  assert model["training"] == {k: v for k, v in FACTS.items() if k != "workdir"}
  assert model["versions"]["python"] and model["versions"]["numpy"] == np.__version__


# The exported coding state counts, not what this machine would derive


def test_nothing_is_derived_when_loading(exported, monkeypatch):
  def derive(self):
    raise AssertionError("derived")

  monkeypatch.setattr(type(exported.codec), "derive_coding", derive)
  _load(exported, exported.data)


@pytest.mark.slow
def test_other_tables_are_honoured_and_make_another_model(exported, monkeypatch):
  derived = exported.codec.derive_coding()
  first = next(k for k in sorted(derived) if k.split("/")[-1].split(".")[-1].endswith("first"))
  moved = {**derived, first: derived[first] - 1}
  image = picture(40, 56)
  ours = exported.codec.compress(image)
  monkeypatch.setattr(type(exported.codec), "derive_coding", lambda self: moved)
  try:
    elsewhere = exported.dumps()
    theirs = exported.codec.compress(image)
    expected = exported.codec.decompress(theirs)
  finally:
    monkeypatch.undo()
    exported.codec.prepare()
  loaded = _load(exported, elsewhere)
  assert loaded.fingerprint != exported.codec.fingerprint
  np.testing.assert_array_equal(loaded.decompress(theirs), expected)
  with pytest.raises(BitstreamError):
    loaded.decompress(ours)
  with pytest.raises(BitstreamError):
    exported.codec.decompress(theirs)
  # The same tables under the first model's fingerprint are refused.
  forged = _forged(exported.data, _replace(f"coding/{first}", moved[first]))
  with pytest.raises(ArtefactError, match="its arrays are those of"):
    _load(exported, forged)


def test_other_synthesis_weights_under_the_same_fingerprint_are_refused(exported):
  decoder = {id(v) for v in exported.codec.decoder_variables}
  named = artefacts.named_variables(exported.codec)
  name = next(k for k, v in named.items() if id(v) in decoder)
  changed = named[name].numpy()
  changed.flat[0] = np.nextafter(changed.flat[0], np.float32(1))
  with pytest.raises(ArtefactError, match="its arrays are those of"):
    _load(exported, _forged(exported.data, _replace(f"weights/{name}", changed)))


@pytest.mark.slow
def test_a_decoder_decodes_and_refuses_to_compress(exported):
  data = exported.dumps(decoder_only=True)
  assert len(data) < len(exported.data)
  loaded = _load(exported, data, encoder=False)
  file = exported.codec.compress(picture(17, 33))
  np.testing.assert_array_equal(loaded.decompress(file), exported.codec.decompress(file))
  with pytest.raises(ArtefactError, match="cannot compress"):
    _load(exported, data)


# Damage


def test_every_flipped_byte_is_refused(exported):
  data = exported.data
  random = np.random.default_rng(0)
  ends = [*range(120), *range(len(data) - 150, len(data))]
  for position in [*ends, *random.integers(0, len(data), 100)]:
    damaged = bytearray(data)
    damaged[position] ^= 1 << int(random.integers(8))
    with pytest.raises(ArtefactError):
      artefacts.loads(bytes(damaged))


def test_every_truncation_and_appendix_is_refused(exported):
  data = exported.data
  lengths = [*range(0, 80), *range(len(data) - 80, len(data)), *range(0, len(data), 997)]
  for length in lengths:
    with pytest.raises(ArtefactError):
      artefacts.loads(data[:length])
  for more in (b"x", data, bytes(64)):
    with pytest.raises(ArtefactError):
      artefacts.loads(data + more)


# Forgeries with right checksums


def _set(key, value):
  return lambda model, members: model.update({key: value})


def _first_weight(model):
  return next(name for name in model["arrays"] if name.startswith("weights/"))


def _drop(model, members):
  name = _first_weight(model)
  del model["arrays"][name], members[f"{name}.npy"]


def _in_config(key, value):
  """A change for `_forged`: a field of the analysis transform's config."""
  return lambda model, members: model["model_config"]["analysis"].update({key: value})


def _drop_member(model, members):
  del members[f"{_first_weight(model)}.npy"]


def _wrong_group(model, members):
  _replace("other/x", np.zeros(3))(model, members)


def _huge_shape(model, members):
  model["arrays"][_first_weight(model)]["shape"] = [1 << 20, 1 << 20, 1 << 20]


def _stored_as(dtype):
  def change(model, members):
    model["arrays"][_first_weight(model)]["stored"] = dtype

  return change


def _narrow_kernel_stored_as_wider(model, members):
  """int16 that says it is stored as int32: reading it would wrap."""
  model["arrays"][_first_weight(model)].update(dtype="int16", stored="int32")


def _wrong_digest(model, members):
  model["arrays"][_first_weight(model)]["sha256"] = "0" * 64


def _pickled(model, members):
  name = _first_weight(model)
  stream = io.BytesIO()
  np.save(stream, np.array([{}], object), allow_pickle=True)
  members[f"{name}.npy"] = stream.getvalue() + bytes(1 << 16)
  digest = hashlib.sha256(members[f"{name}.npy"]).hexdigest()
  model["arrays"][name]["sha256"] = digest


def _set_member(content):
  """A change for `_forged`: other bytes for the first weight, announced as it was."""

  def change(model, members):
    name = _first_weight(model)
    members[f"{name}.npy"] = content(members[f"{name}.npy"])
    model["arrays"][name]["sha256"] = hashlib.sha256(members[f"{name}.npy"]).hexdigest()

  return change


def _huge_header(member):
  end = member.index(b"\n")
  return member[:10] + member[10:end].replace(b"(", b"(1048576, ")[: end - 10] + member[end:]


FORGERIES = {
  "a newer version": (_set("schema_version", 5), "schema version 5"),
  "no version": (_set("schema_version", None), "schema version None"),
  "no config": (_set("model_config", None), "lacks fields"),
  "a fingerprint that is none": (_set("fingerprint", "xyz"), "lacks fields"),
  "a short fingerprint": (_set("fingerprint", "00"), "lacks fields"),
  "no arrays": (_set("arrays", {"weights/x": None}), "lacks fields"),
  "an empty config": (_set("model_config", {}), "cannot build"),
  "filters below 0": (_in_config("num_filters", -1), "cannot build"),
  "no filters": (_in_config("num_filters", 0), "cannot build"),
  "half a filter": (_in_config("num_filters", 2.5), "cannot build"),
  "a million filters": (
    _in_config("num_filters", 1 << 20),
    "cannot build",
  ),
  "a missing weight": (_drop, r"\(missing\)"),
  "a missing member": (_drop_member, "differ in"),
  "an unknown weight": (_replace("weights/x", np.zeros(3, np.float32)), r"x \(unknown\)"),
  "an unknown group": (_wrong_group, "no known group"),
  "a huge shape": (_huge_shape, "hostile"),
  "a wrong digest": (_wrong_digest, "does not hold"),
  "stored as something wider": (_stored_as("float64"), "lacks fields"),
  "integers stored as something wider": (_narrow_kernel_stored_as_wider, "lacks fields"),
  "stored as objects": (_stored_as("object"), "lacks fields"),
  "stored as integers": (_stored_as("int8"), "lacks fields"),
  "a pickle": (_pickled, "announces"),
  "a member of another shape": (_set_member(lambda m: _npy(np.zeros(9999, "<f4"))), "announces"),
  "a header of a huge shape": (_set_member(_huge_header), "announces"),
  "a header without end": (_set_member(lambda m: m[:60].ljust(len(m), b"(")), "announces"),
  "a member of text": (_set_member(lambda m: b"text".ljust(len(m))), "announces"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forgeries_with_right_checksums_are_refused(exported, forgery):
  change, message = FORGERIES[forgery]
  with pytest.raises(ArtefactError, match=message):
    _load(exported, _forged(exported.data, change))


def test_a_weight_of_another_shape_or_type_is_refused_by_name(exported):
  name, variable = next(iter(artefacts.named_variables(exported.codec).items()))
  value = variable.numpy()
  for other in (value[..., None], value.astype(np.float64)):
    with pytest.raises(ArtefactError, match=f"{name} \\(differs\\)"):
      _load(exported, _forged(exported.data, _replace(f"weights/{name}", other)))


def test_a_missing_or_foreign_coding_array_is_refused(exported):
  name = sorted(exported.codec.derive_coding())[0]

  def drop(model, members):
    del model["arrays"][f"coding/{name}"], members[f"coding/{name}.npy"]

  for change in (drop, _replace(f"coding/{name}", np.zeros([2, 3], np.int32))):
    with pytest.raises(ArtefactError, match=r"coding tables|its arrays"):
      _load(exported, _forged(exported.data, change))


def test_compressed_members_are_refused_before_they_are_unpacked(exported):
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, content in _members(exported.data).items():
      archive.writestr(name, content)
    archive.writestr("coding/bomb.npy", bytes(1 << 22))
    archive.comment = b"ntcm sha256 " + bytes(64)
  with pytest.raises(ArtefactError, match="hostile"):
    artefacts.loads(_resealed(stream.getvalue()))


def test_members_that_share_bytes_are_refused(exported):
  data = bytearray(exported.data)
  # All entries of the central directory point at one large member, and have its name's length.
  with zipfile.ZipFile(io.BytesIO(exported.data)) as archive:
    largest = max(archive.infolist(), key=lambda i: i.file_size)
    entry = archive.start_dir
    for info in archive.infolist():
      data[entry + 20 : entry + 28] = int(largest.file_size).to_bytes(4, "little") * 2
      data[entry + 42 : entry + 46] = int(largest.header_offset).to_bytes(4, "little")
      entry += 46 + len(info.filename)
  with pytest.raises(ArtefactError, match="hostile"):
    artefacts.loads(_resealed(bytes(data)))


def _resealed(data):
  return data[:-64] + hashlib.sha256(data[:-64]).hexdigest().encode()


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
  path = tmp_path / "large.ntcm"
  with path.open("wb") as f:
    f.truncate(artefacts.MAX_BYTES + 1)  # Sparse: it takes no room.
  for function in (artefacts.read, artefacts.peek):
    with pytest.raises(ArtefactError, match="more than"):
      function(path)


# Finding


def test_models_are_found_by_fingerprint_and_unreadable_ones_are_named(exported, tmp_path):
  (tmp_path / "full.ntcm").write_bytes(exported.data)
  (tmp_path / "decoder.ntcm").write_bytes(exported.dumps(decoder_only=True))
  (tmp_path / "broken.ntcm").write_bytes(exported.data[:1000])
  (tmp_path / "other.txt").write_bytes(exported.data)
  found, wrong = artefacts.find(tmp_path, exported.codec.fingerprint)
  assert [p.name for p in found] == ["decoder.ntcm", "full.ntcm"]
  assert len(wrong) == 1 and "broken.ntcm" in wrong[0]
  assert artefacts.find(tmp_path, bytes(6))[0] == []
  assert artefacts.find(tmp_path / "nowhere", bytes(6)) == ([], [])


@pytest.mark.slow
def test_a_glance_at_damaged_files_has_one_kind_of_error(exported, tmp_path):
  data, path = exported.data, tmp_path / "model.ntcm"
  random = np.random.default_rng(0)
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    directory = archive.start_dir
  positions = [*range(90), *range(directory, directory + 60), *range(len(data) - 100, len(data))]
  refused = 0
  for position in positions:
    damaged = bytearray(data)
    damaged[position] ^= int(random.integers(1, 256))
    path.write_bytes(damaged)
    try:
      assert artefacts.peek(path)["family"]
    except ArtefactError:
      refused += 1
  assert refused > 50


def test_reading_needs_no_tensorflow(exported, tmp_path):
  path = tmp_path / "model.ntcm"
  path.write_bytes(exported.data)
  code = (
    "import sys; from common import artefacts; a = artefacts.read(sys.argv[1]);"
    "a.arrays('weights'), a.arrays('coding'); artefacts.peek(sys.argv[1]);"
    "assert 'tensorflow' not in sys.modules; print(a.fingerprint.hex())"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == exported.codec.fingerprint.hex()
