"""Data sets in archives and arrays: unpacked once and safely, or refused; nothing half done."""

import io
import pathlib
import sys
import tarfile
import threading
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

import configs
from common import data, unpack
from tests.conftest import picture


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  folder = tmp_path / "cache"
  monkeypatch.setattr(configs, "DATA_CACHE_DIR", folder)
  return folder


def png(seed):
  file = io.BytesIO()
  Image.fromarray(picture(20, 24, seed)).save(file, "PNG")
  return file.getvalue()


MEMBERS = {"b/1.png": png(1), "a/0.png": png(0), "a/deep/er/2.png": png(2), "notes.txt": b"hello"}


def write_tar(path, members, links=()):
  mode = {".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}.get(path.suffix, "w")
  with tarfile.open(path, mode) as file:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      file.addfile(info, io.BytesIO(content))
    for name, target in links:
      info = tarfile.TarInfo(name)
      info.type, info.linkname = tarfile.SYMTYPE, target
      file.addfile(info)
  return path


def write_zip(path, members, links=()):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
    for name, content in members.items():
      file.writestr(name, content)
    for name, target in links:
      info = zipfile.ZipInfo(name)
      info.external_attr = 0o120777 << 16
      file.writestr(info, target)
  return path


def write(path, members, links=()):
  return (write_zip if path.suffix == ".zip" else write_tar)(path, members, links)


NAMES = ["x.tar", "x.tar.gz", "x.tgz", "x.tar.xz", "x.tar.bz2", "x.zip"]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_an_archive_are_those_of_its_folders(tmp_path, name):
  archive = write(tmp_path / name, MEMBERS)
  images = data.load_eval_images(str(archive))
  assert images.names == ["0.png", "2.png", "1.png"]
  for (_, pixels), seed in zip(images, (0, 2, 1)):
    np.testing.assert_array_equal(pixels, picture(20, 24, seed))
  sampler = data.CropSampler(dict(dataset=str(archive), batchsize=2, patchsize=16), 0)
  assert sampler.batch(0).shape == (2, 16, 16, 3)


def test_an_archive_is_unpacked_once_and_anew_when_it_changed(tmp_path, cache):
  archive = write_zip(tmp_path / "x.zip", MEMBERS)
  first = unpack.unpacked(archive, data._is_picture)
  marker = first / "marker"
  marker.touch()
  assert unpack.unpacked(archive, data._is_picture) == first and marker.exists()
  assert not list(first.rglob("*.txt"))
  write_zip(archive, {"new.png": png(5)})
  assert data.load_eval_images(str(archive)).names == ["new.png"]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.zip"])
def test_a_time_in_a_name_is_no_drive(tmp_path, cache, name):
  archive = write(tmp_path / name, {"12:30.png": png(0)})
  assert data.load_eval_images(str(archive)).names == ["12:30.png"]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.zip"])
@pytest.mark.parametrize(
  "evil", ["../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png", "c:/evil.png"]
)
def test_no_path_leaves_the_folder(tmp_path, cache, name, evil):
  archive = write(tmp_path / name, {"good.png": png(0), evil: png(1)})
  with pytest.raises(data.DataError, match="leads out of it"):
    data.resolve(str(archive))
  assert not list(tmp_path.rglob("evil.png")) and not pathlib.Path("/evil.png").exists()
  assert not [p for p in (cache / "archives").iterdir() if p.is_dir()]


@pytest.mark.parametrize("name", ["x.tar", "x.zip"])
def test_links_are_left_out(tmp_path, name):
  archive = write(tmp_path / name, {"0.png": png(0)}, [("link.png", "/etc/passwd")])
  assert data.load_eval_images(str(archive)).names == ["0.png"]


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_archive_is_refused_wherever_it_was_cut(tmp_path, cache, name):
  whole = write(tmp_path / name, MEMBERS).read_bytes()
  content = whole.rstrip(b"\0") if name == "x.tar" else whole  # Its end is padded with zeros.
  archive = tmp_path / ("cut-" + name)
  refused = 0
  for length in range(0, len(content), max(1, len(content) // 40)):
    archive.write_bytes(whole[:length])
    try:  # At the end of a compressed one there is nothing that a picture needs.
      assert len(data.resolve(str(archive))) == 3
      assert length > 0.9 * len(content)
    except data.DataError:
      refused += 1
  assert refused > 30
  assert not [p for p in (cache / "archives").iterdir() if p.name.endswith(".tmp")]


def test_a_member_that_unpacks_to_more_than_it_says_is_refused(tmp_path):
  archive = write_zip(tmp_path / "x.zip", {"0.png": b"\0" * 100_000})
  content = bytearray(archive.read_bytes())
  at = content.index(b"PK\x01\x02") + 24  # The size in the table at the end.
  content[at : at + 4] = (50_000).to_bytes(4, "little")
  archive.write_bytes(content)
  with pytest.raises(data.DataError):
    data.resolve(str(archive))


def test_archives_without_pictures_and_files_that_are_none_are_refused(tmp_path):
  with pytest.raises(data.DataError, match="holds no picture"):
    data.resolve(str(write_zip(tmp_path / "x.zip", {"notes.txt": b"x"})))
  for name in NAMES:
    (tmp_path / name).write_bytes(b"this is no archive")
    with pytest.raises(data.DataError, match="damaged"):
      data.resolve(str(tmp_path / name))


def test_several_readers_of_one_archive_unpack_it_once(tmp_path, monkeypatch):
  archive = write_zip(tmp_path / "x.zip", MEMBERS)
  calls = []
  real = unpack._unpack
  monkeypatch.setattr(unpack, "_unpack", lambda *args: (calls.append(1), real(*args)))
  threads = [threading.Thread(target=data.resolve, args=[str(archive)]) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert calls == [1]


def test_a_full_disk_while_unpacking_leaves_nothing_and_says_where(tmp_path, cache, monkeypatch):
  archive = write_zip(tmp_path / "x.zip", MEMBERS)

  def full(*unused):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(unpack.shutil, "copyfileobj", full)
  with pytest.raises(data.DataError, match="NTC_DATA_CACHE_DIR"):
    data.resolve(str(archive))
  assert not [p for p in (cache / "archives").iterdir() if p.is_dir()]
  monkeypatch.undo()
  monkeypatch.setattr(configs, "DATA_CACHE_DIR", cache)
  assert len(data.resolve(str(archive))) == 3


@pytest.mark.parametrize("shape", [(3, 20, 24, 3), (3, 20, 24), (3, 20, 24, 1)])
def test_pictures_of_an_array(tmp_path, shape):
  array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
  np.save(tmp_path / "photos.npy", array)
  images = data.load_eval_images(str(tmp_path / "photos.npy"))
  assert images.names == [f"photos-{i:06d}" for i in range(3)]
  wide = array.reshape(3, 20, 24, -1)
  wide = np.repeat(wide, 3, axis=3) if wide.shape[3] == 1 else wide
  for i, (_, pixels) in enumerate(images):
    np.testing.assert_array_equal(pixels, wide[i])
  config = dict(dataset=str(tmp_path / "photos.npy"), batchsize=4, patchsize=16, cache_mb=0)
  cached = data.CropSampler({**config, "cache_mb": 10}, 0)
  sampler = data.CropSampler(config, 0)
  for step in range(3):
    np.testing.assert_array_equal(sampler.batch(step), cached.batch(step))


@pytest.mark.parametrize("array", [
  np.zeros([2, 20, 24, 3], np.float32), np.zeros([20, 24], np.uint8),
  np.zeros([0, 8, 8, 3], np.uint8), np.zeros([2, 8, 8, 4], np.uint8),
])  # fmt: skip
def test_arrays_that_are_no_pictures_are_refused(tmp_path, array):
  np.save(tmp_path / "x.npy", array)
  with pytest.raises(data.DataError, match=r"uint8 \[N,H,W,3\]"):
    data.resolve(str(tmp_path / "x.npy"))


def test_a_broken_array_file_is_named(tmp_path):
  np.save(tmp_path / "x.npy", np.zeros([9, 20, 24, 3], np.uint8))
  content = (tmp_path / "x.npy").read_bytes()
  for wrong in (b"", b"nonsense", content[:200]):
    (tmp_path / "x.npy").write_bytes(wrong)
    with pytest.raises(data.DataError, match=r"x\.npy"):
      data.resolve(str(tmp_path / "x.npy"))
  np.save(tmp_path / "x.npy", np.array([{"an": "object"}]), allow_pickle=True)
  with pytest.raises(data.DataError, match=r"x\.npy"):
    data.resolve(str(tmp_path / "x.npy"))


def test_data_sets_of_tensorflow_datasets_are_written_once(tmp_path, cache, monkeypatch):
  loads = []

  def load(name, split):
    loads.append((name, split))
    if name != "photos":
      raise ValueError("Dataset not found. Did you mean: photos?")
    return [{"image": picture(20, 24, i)} for i in range(3)]

  monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.SimpleNamespace(load=load))
  images = data.load_eval_images("tfds:photos:test")
  assert images.name == "tfds-photos-test"
  assert [name for name, _ in images] == ["000000.png", "000001.png", "000002.png"]
  np.testing.assert_array_equal(images[1][1], picture(20, 24, 1))
  assert data.load_eval_images("tfds:photos:test").hash == images.hash
  assert loads == [("photos", "test")]
  with pytest.raises(data.DataError, match="Did you mean: photos"):
    data.resolve("tfds:phots")
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(data.DataError, match="pip install"):
    data.resolve("tfds:others")
