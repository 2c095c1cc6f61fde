"""Promises of common/data.py and common/dead_leaves.py."""

import json
import logging
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import configs
from common import data, dead_leaves, unpack

ROOT = pathlib.Path(__file__).resolve().parent.parent


def noise(rows, columns, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def save(path, array, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path, **options)
  return path


def config(folder, **changes):
  return {"dataset": str(folder), "batchsize": 4, "patchsize": 8, **changes}


def constant_pictures(folder, count, side=12):
  """Picture k has the value k everywhere, so that a crop tells whence it comes."""
  for k in range(count):
    save(folder / f"{k:02d}.png", np.full((side, side, 3), k, np.uint8))
  return folder


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
  """Seven pictures of noise of several sizes, PNG and JPEG of all subsamplings."""
  folder = tmp_path_factory.mktemp("textures")
  for k in range(3):
    save(folder / f"{k}.png", noise(20 + 7 * k, 33 - 5 * k, k))
  for k in range(3):
    smooth = np.array(Image.fromarray(noise(9, 11, k)).resize((97 + k, 61 + k)))
    save(folder / f"{k}.jpg", smooth, quality=85, subsampling=k)
  save(folder / "grey.jpeg", noise(40, 50)[..., 0], progressive=True)
  return folder


# --- Names ---------------------------------------------------------------------------------------


def names(dataset):
  return [s.name for s in data.resolve(str(dataset))]


def test_folder_is_searched_recursively_in_order(tmp_path):
  for name in ("b.PNG", "a.jpg", "sub/deep/c.JPeG", "sub/d.webp", "z.bmp", "t.tiff", "t2.tif"):
    save(tmp_path / name, noise(4, 4))
  for name in ("notes.txt", ".hidden.png", "._a.jpg", ".cache/x.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
  in_order = ["a.jpg", "b.PNG", "d.webp", "c.JPeG", "t.tiff", "t2.tif", "z.bmp"]
  assert names(tmp_path) == in_order
  assert names(tmp_path) == names(str(tmp_path) + "/")


def test_same_base_names_get_relative_paths(tmp_path):
  for name in ("x/a.png", "y/a.png", "y/b.png", "a.png"):
    save(tmp_path / name, noise(4, 4))
  assert names(tmp_path) == ["a.png", "x/a.png", "y/a.png", "b.png"]
  assert names(tmp_path / "*" / "a.png") == ["x/a.png", "y/a.png"]


def test_globs_and_files(tmp_path):
  for name in ("p/a1.png", "p/a2.png", "p/b1.png", "q/deep/a1.png"):
    save(tmp_path / name, noise(4, 4))
  assert names(tmp_path / "p" / "a*") == ["a1.png", "a2.png"]
  assert names(tmp_path / "p" / "?1.png") == ["a1.png", "b1.png"]
  assert names(tmp_path / "**" / "a1.png") == ["p/a1.png", "q/deep/a1.png"]
  assert len(names(tmp_path / "*")) == 4  # Folders that match are searched.
  assert names(tmp_path / "p" / "b1.png") == ["b1.png"]


def test_link_loops_end(tmp_path):
  save(tmp_path / "a" / "a.png", noise(4, 4))
  (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
  assert names(tmp_path) == ["a.png"]


def test_existing_folder_with_brackets_is_no_glob(tmp_path):
  save(tmp_path / "set[1]" / "a.png", noise(4, 4))
  assert names(tmp_path / "set[1]") == ["a.png"]


@pytest.mark.parametrize("name", ["cocotrain", "no/such/folder", "~/no_such_folder_here"])
def test_unknown_name_lists_the_known(name, monkeypatch):
  monkeypatch.setattr(configs, "DATASETS", {"kodak": "/k", "coco": "/c"})
  with pytest.raises(data.DataError) as e:
    data.resolve(name)
  assert str(e.value) == (
    f"Unknown dataset {name!r}. Known: coco, kodak, sample, sample_train. "
    "A glob needs a '*', a folder must exist."
  )


def test_known_name_without_its_folder_names_the_setting(monkeypatch, tmp_path):
  monkeypatch.setattr(configs, "DATA_DIR", tmp_path)
  monkeypatch.setattr(configs, "DATASETS", {"coco": str(tmp_path / "x" / "coco"), "mine": "/no/m"})
  with pytest.raises(data.DataError, match=r"'coco'.*configs.py.*NTC_DATA_DIR.*'x/coco'") as e:
    data.resolve("coco")
  assert str(tmp_path / "x" / "coco") in str(e.value)
  with pytest.raises(data.DataError, match=r"/no/m.*DATASETS\['mine'\] in configs.py\.$"):
    data.resolve("mine")


def test_known_name_may_be_a_glob(monkeypatch, tmp_path):
  save(tmp_path / "a.png", noise(4, 4))
  monkeypatch.setattr(
    configs, "DATASETS", {"m": str(tmp_path / "*.png"), "n": str(tmp_path / "x*")}
  )
  assert names("m") == ["a.png"]
  assert data.load_eval_images("m").name == "m"
  with pytest.raises(data.DataError, match=r"'n'.*matches nothing"):
    data.resolve("n")


def test_nothing_found_is_an_error(tmp_path):
  (tmp_path / "a.txt").write_text("x")
  with pytest.raises(data.DataError, match="holds no picture"):
    data.resolve(str(tmp_path))
  with pytest.raises(data.DataError, match="matches nothing"):
    data.resolve(str(tmp_path / "*.png"))
  with pytest.raises(data.DataError, match="matches 1 paths, but no picture"):
    data.resolve(str(tmp_path / "*"))
  with pytest.raises(data.DataError, match="is no picture"):
    data.resolve(str(tmp_path / "a.txt"))
  with pytest.raises(data.DataError):
    data.resolve("")


def test_labels_are_fit_for_folders(tmp_path):
  folder = tmp_path / "my photos"
  save(folder / "a1.png", noise(4, 4))
  labels = {
    str(folder): "my_photos",
    str(folder / "*.png"): "my_photos",
    str(folder / "**" / "*"): "my_photos",
    str(folder / "a*"): "my_photos-a",
    str(folder / "a1.png"): "a1.png",
  }
  found = {d: data.load_eval_images(d).name for d in labels}
  assert {d: name[:-9] for d, name in found.items()} == labels
  assert all(re.fullmatch(r".*-[0-9a-f]{8}", name) for name in found.values())
  assert len(set(found.values())) == 5


# --- Conversions ---------------------------------------------------------------------------------


def read(path):
  array = data.read_image(path)
  assert array.dtype == np.uint8
  assert array.ndim == 3 and array.shape[2] == 3
  return array


def test_rgb_is_untouched(tmp_path):
  image = noise(5, 7)
  for name in ("a.png", "a.bmp", "a.tif", "a.ppm"):
    np.testing.assert_array_equal(read(save(tmp_path / name, image)), image)


def test_grey_is_repeated(tmp_path):
  grey = noise(5, 7)[..., 0]
  np.testing.assert_array_equal(read(save(tmp_path / "a.png", grey)), grey[..., None].repeat(3, 2))
  Image.fromarray(grey > 99).save(tmp_path / "bits.png")
  assert set(np.unique(read(tmp_path / "bits.png"))) == {0, 255}


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
  grey = np.array([[0, 128, 129, 255, 256], [257, 32768, 65534, 65535, 1000]], np.uint16)
  expected = np.rint(grey * (255 / 65535)).astype(np.uint8)
  image = read(save(tmp_path / f"a.{suffix}", grey))
  np.testing.assert_array_equal(image, expected[..., None].repeat(3, 2))


def test_16_bit_colour_is_scaled(tmp_path):
  tifffile = pytest.importorskip("tifffile")
  color = noise(6, 5).astype(np.uint16) * 257
  tifffile.imwrite(tmp_path / "a.tif", color, photometric="rgb")
  try:
    image = read(tmp_path / "a.tif")
  except OSError:
    pytest.skip("this Pillow does not read 16-bit colour TIFF")
  np.testing.assert_array_equal(image, (color // 257).astype(np.uint8))


def test_pixels_without_a_range_are_refused():
  for array in (np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32)):
    with pytest.raises(ValueError, match="no defined range"):
      data.to_rgb(Image.fromarray(array))
  inside = data.to_rgb(Image.fromarray(np.full((1, 1), 65535, np.int32)))
  assert inside.tolist() == [[[255, 255, 255]]]


def test_transparency_is_composited_on_white(tmp_path):
  rgba = np.dstack([np.full((2, 3, 3), 100, np.uint8), [[0, 255, 51]] * 2]).astype(np.uint8)
  for name in ("a.png", "a.webp", "a.tif"):
    image = read(save(tmp_path / name, rgba, **({"lossless": True} if "webp" in name else {})))
    assert image[0].tolist() == [[255] * 3, [100] * 3, [224] * 3], name
  grey = save(tmp_path / "la.png", np.ascontiguousarray(rgba[..., 2:]))
  assert read(grey)[0].tolist() == [[255] * 3, [100] * 3, [224] * 3]


def test_palettes(tmp_path):
  image = Image.fromarray(noise(8, 8)).quantize(16)
  image.save(tmp_path / "a.png")
  image.save(tmp_path / "a.gif")
  expected = np.array(image.convert("RGB"))
  np.testing.assert_array_equal(read(tmp_path / "a.png"), expected)
  np.testing.assert_array_equal(read(tmp_path / "a.gif"), expected)
  first = image.getpixel((0, 0))
  image.save(tmp_path / "t.png", transparency=first)
  see_through = np.asarray(image) == first
  np.testing.assert_array_equal(read(tmp_path / "t.png")[see_through], 255)
  np.testing.assert_array_equal(read(tmp_path / "t.png")[~see_through], expected[~see_through])


def test_cmyk_jpeg(tmp_path):
  smooth = Image.fromarray(noise(3, 3)).resize((32, 24))
  smooth.convert("CMYK").save(tmp_path / "a.jpg", quality=98, subsampling=0)
  difference = read(tmp_path / "a.jpg").astype(int) - np.asarray(smooth)
  assert np.abs(difference).mean() < 4
  crop = data.FileImage("a", tmp_path / "a.jpg").load_crop(3, 5, 16)
  np.testing.assert_array_equal(crop, read(tmp_path / "a.jpg")[3:19, 5:21])


def test_orientation_is_left_as_stored(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  image = noise(4, 9)
  assert read(save(tmp_path / "a.png", image, exif=exif)).shape == (4, 9, 3)
  assert data.FileImage("a", tmp_path / "a.png").size() == (4, 9)


def test_one_pixel(tmp_path):
  images = data.load_eval_images(str(save(tmp_path / "a.png", noise(1, 1))))
  assert images[0][1].shape == (1, 1, 3)


def test_jpeg_crops_equal_the_whole_picture(textures):
  rng = np.random.default_rng(0)
  for source in data.resolve(str(textures)):
    whole, (rows, columns) = source.load(), source.size()
    assert whole.shape == (rows, columns, 3)
    for _ in range(20):
      side = int(rng.integers(1, min(rows, columns) + 1))
      top, left = rng.integers(0, rows - side + 1), rng.integers(0, columns - side + 1)
      crop = source.load_crop(int(top), int(left), side)
      np.testing.assert_array_equal(crop, whole[top : top + side, left : left + side])


# --- Evaluation ----------------------------------------------------------------------------------


def test_eval_images_come_one_by_one(tmp_path):
  arrays = [noise(4 + k, 6, k) for k in range(3)]
  paths = [save(tmp_path / f"{k}.png", a) for k, a in enumerate(arrays)]
  images = data.load_eval_images(str(tmp_path))
  assert len(images) == 3
  assert images.names == ["0.png", "1.png", "2.png"]
  assert images.paths == paths
  assert images.skipped == {}
  assert images[-1][0] == "2.png"
  for (name, image), expected in zip(images, arrays):
    assert name in images.names
    np.testing.assert_array_equal(image, expected)
  with pytest.raises(IndexError):
    images[3]


def test_hash_is_of_pixels_and_names(tmp_path):
  image = noise(6, 4)
  base = data.load_eval_images(str(save(tmp_path / "0" / "a.png", image).parent)).hash
  same = save(tmp_path / "1" / "a.png", image, compress_level=0).parent
  other = image.copy()
  other[0, 0, 0] ^= 1
  assert len(base) == 64
  assert data.load_eval_images(str(same)).hash == base
  for k, (name, pixels) in enumerate(
    [("b.png", image), ("a.png", other), ("a.png", image.reshape(4, 6, 3))]
  ):
    folder = save(tmp_path / f"x{k}" / name, pixels).parent
    assert data.load_eval_images(str(folder)).hash != base
  images = data.load_eval_images(str(same))
  list(images)
  (same / "a.png").unlink()
  assert images.hash == base  # Taken while iterating.


def broken_files(folder):
  """Files broken in the header, and files broken in the pixels."""
  folder.mkdir(exist_ok=True)
  (folder / "empty.png").write_bytes(b"")
  (folder / "text.jpg").write_text("no picture")
  save(folder / "cut.png", noise(64, 64))
  save(folder / "cut.jpg", noise(64, 64))
  for name in ("cut.png", "cut.jpg"):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])


def test_broken_files_are_skipped_named_and_counted(tmp_path, caplog):
  broken_files(tmp_path)
  save(tmp_path / "good.png", noise(5, 5))
  images = data.load_eval_images(str(tmp_path))
  assert sorted(images.skipped) == ["empty.png", "text.jpg"]
  assert [name for name, _ in images] == ["good.png"]
  assert sorted(images.skipped) == ["cut.jpg", "cut.png", "empty.png", "text.jpg"]
  assert all(images.skipped.values())
  assert len(images) == 1 and images.names == ["good.png"]
  for name in images.skipped:
    assert f"Skipped {name} of" in caplog.text
  fresh = data.load_eval_images(str(tmp_path))
  assert fresh.hash == images.hash
  assert len(fresh) == 1


def test_asking_for_a_broken_picture_raises(tmp_path):
  broken_files(tmp_path)
  save(tmp_path / "good.png", noise(5, 5))
  images = data.load_eval_images(str(tmp_path))
  with pytest.raises(data.DataError, match=r"cut.jpg .* broken: OSError"):
    images[0]
  assert "cut.jpg" not in images.names


def test_only_broken_files_is_an_error(tmp_path):
  (tmp_path / "a.png").write_bytes(b"")
  with pytest.raises(data.DataError, match=r"No picture .* first is a.png"):
    data.load_eval_images(str(tmp_path))
  save(tmp_path / "a.png", noise(64, 64))
  (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
  with pytest.raises(data.DataError, match="No picture"):
    list(data.load_eval_images(str(tmp_path)))


def test_running_out_of_memory_is_not_blamed_on_the_file(tmp_path, monkeypatch):
  save(tmp_path / "a.png", noise(8, 8))
  images = data.load_eval_images(str(tmp_path))
  sampler = data.CropSampler(config(tmp_path), 0)

  def fail(path):
    raise MemoryError

  monkeypatch.setattr(data, "read_image", fail)
  with pytest.raises(MemoryError):
    images[0]
  with pytest.raises(MemoryError):
    sampler.batch(0)


def test_evaluation_needs_no_tensorflow():
  code = "import sys; from common import data; list(data.load_eval_images('sample')); "
  code += "assert 'tensorflow' not in sys.modules and 'skimage' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- Sample sets ---------------------------------------------------------------------------------


@pytest.fixture()
def few_leaves(monkeypatch, tmp_path):
  monkeypatch.setattr(configs, "DATA_CACHE_DIR", tmp_path / "cache")
  monkeypatch.setattr(dead_leaves, "NUM_PICTURES", 2)
  return tmp_path / "cache"


def test_sample_is_colour_photographs():
  images = data.load_eval_images("sample")
  assert images.name == "sample"
  assert len(images) == 7
  for name, image in images:
    assert min(image.shape[:2]) >= 256, name
    assert np.ptp(image.astype(int), axis=2).mean() > 8, name


def test_sample_train_shares_no_picture_with_sample(few_leaves):
  train = data.load_eval_images("sample_train")
  held_out = data.load_eval_images("sample")
  assert len(train) == 2 + len(data.SAMPLE_TRAIN_FILES)
  assert not set(train.names) & set(held_out.names)
  assert not any("motorcycle" in name for name in train.names)  # The twin of one held out.

  def thumbnails(images):
    small = [np.array(Image.fromarray(i).convert("L").resize((16, 16))) for _, i in images]
    flat = np.array(small, float).reshape(len(small), -1)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)

  assert (thumbnails(train) @ thumbnails(held_out).T).max() < 0.8


def test_sample_train_is_made_once(few_leaves, monkeypatch):
  first = data.resolve("sample_train")
  stamps = [s.path.stat().st_mtime_ns for s in first]

  def fail(folder):
    raise AssertionError("made twice")

  monkeypatch.setattr(dead_leaves, "write_pictures", fail)
  assert data.resolve("sample_train") == first
  assert [s.path.stat().st_mtime_ns for s in first] == stamps


def test_interrupted_generation_is_never_used(few_leaves, monkeypatch):
  write = dead_leaves.write_pictures

  def interrupted(folder):
    (folder / "leaves000.png").write_bytes(b"half")
    raise KeyboardInterrupt

  monkeypatch.setattr(dead_leaves, "write_pictures", interrupted)
  with pytest.raises(KeyboardInterrupt):
    data.resolve("sample_train")
  folder = few_leaves / f"sample_train-v{dead_leaves.VERSION}"
  assert not folder.exists()
  # What a killed process leaves behind.
  leftover = few_leaves / f".{folder.name}.abc.tmp"
  leftover.mkdir()
  (leftover / "leaves000.png").write_bytes(b"half")
  monkeypatch.setattr(dead_leaves, "write_pictures", write)
  for source in data.resolve("sample_train"):
    assert source.load().shape == (512, 512, 3)
  assert not leftover.exists()


def test_unwritable_cache_names_the_setting(monkeypatch, tmp_path):
  (tmp_path / "file").write_text("")
  monkeypatch.setattr(configs, "DATA_CACHE_DIR", tmp_path / "file")
  with pytest.raises(data.DataError, match="NTC_DATA_CACHE_DIR"):
    data.resolve("sample_train")


def _make_slowly(folder, log):
  def make(temporary):
    (temporary / "a").write_text("whole")
    with pathlib.Path(log).open("a") as f:
      f.write("made\n")

  unpack.make_whole(pathlib.Path(folder), make)
  assert (pathlib.Path(folder) / "a").read_text() == "whole"


@pytest.mark.slow
def test_processes_at_once_make_it_once(tmp_path):
  context = multiprocessing.get_context("spawn")
  arguments = (str(tmp_path / "made"), str(tmp_path / "log"))
  processes = [context.Process(target=_make_slowly, args=arguments) for _ in range(3)]
  for process in processes:
    process.start()
  for process in processes:
    process.join(60)
  assert [p.exitcode for p in processes] == [0, 0, 0]
  assert (tmp_path / "log").read_text() == "made\n"
  assert not list(tmp_path.glob(".made.*.tmp"))


def test_losing_the_race_without_locks_is_fine(tmp_path, monkeypatch):
  def no_locks(*unused):
    raise OSError("no locks here")

  monkeypatch.setattr(unpack.fcntl, "flock", no_locks)

  def make(temporary):
    (temporary / "a").write_text("mine")
    (tmp_path / "made").mkdir()  # Another process is done first.
    (tmp_path / "made" / "a").write_text("theirs")

  unpack.make_whole(tmp_path / "made", make)
  assert (tmp_path / "made" / "a").read_text() == "theirs"
  assert not list(tmp_path.glob(".made.*.tmp"))


def test_dead_leaves_are_seeded():
  generator = dead_leaves.Generator(seed=3)
  one = generator.picture(1)
  assert one.shape == (512, 512, 3) and one.dtype == np.uint8
  np.testing.assert_array_equal(dead_leaves.Generator(seed=3).picture(1), one)
  assert (generator.picture(0) != one).mean() > 0.5


@pytest.mark.slow
def test_dead_leaves_have_the_spectrum_of_photographs():
  """Root mean squares of 8x8 DCT coefficients, within a factor 1.75 of 179 photographs' (CID22)."""
  from scipy import fft

  generator = dead_leaves.Generator()
  pictures = np.stack([generator.picture(i) for i in range(10)]).astype(np.float64)
  red, green, blue = np.moveaxis(pictures, -1, 0)
  y = 0.299 * red + 0.587 * green + 0.114 * blue
  bands = np.add.outer(np.arange(8), np.arange(8))
  photographs = {  # Bands 1, 3 and 6.
    "y": (y, [80, 29, 12.6]),
    "cb": (0.564 * (blue - y), [19, 6.7, 2.6]),
    "cr": (0.713 * (red - y), [20.5, 6.8, 2.6]),
  }
  for name, (channel, expected) in photographs.items():
    blocks = channel.reshape(10, 64, 8, 64, 8).swapaxes(2, 3)
    energy = (fft.dctn(blocks, axes=(-2, -1), norm="ortho") ** 2).mean((0, 1, 2))
    found = [np.sqrt(energy[bands == band].mean()) for band in (1, 3, 6)]
    assert np.abs(np.log2(np.array(found) / expected)).max() < 0.8, (name, found)


# --- Crops ---------------------------------------------------------------------------------------


def test_batch_is_a_function_of_seed_and_step(textures):
  first = data.CropSampler(config(textures, patchsize=16, flip=True), 1)
  batches = [first.batch(step) for step in range(9)]
  again = data.CropSampler(config(textures, patchsize=16, flip=True, cache_mb=0), 1)
  for step in (8, 3, 0, 5):  # In any order, and without a cache.
    np.testing.assert_array_equal(again.batch(step), batches[step])
  other = data.CropSampler(config(textures, patchsize=16, flip=True), 2)
  assert all((other.batch(step) != batches[step]).any() for step in range(9))
  assert all((batches[0] != b).any() for b in batches[1:])


def test_crops_do_not_depend_on_the_batchsize(textures):
  small = data.CropSampler(config(textures, batchsize=2), 1)
  large = data.CropSampler(config(textures, batchsize=6), 1)
  np.testing.assert_array_equal(
    np.concatenate([small.batch(step) for step in range(3)]), large.batch(0)
  )


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
  seed=st.integers(-(2**70), 2**70),
  step=st.integers(0, 2**40),
  batchsize=st.integers(1, 9),
  patches=st.integers(1, 5),
  patchsize=st.integers(1, 20),
  cache_mb=st.sampled_from([0, 1]),
  flip=st.booleans(),
)
def test_every_crop_is_a_piece_of_a_picture(
  textures, seed, step, batchsize, patches, patchsize, cache_mb, flip
):
  settings_ = config(
    textures, batchsize=batchsize, patchsize=patchsize, patches_per_image=patches, flip=flip,
    cache_mb=cache_mb,
  )  # fmt: skip
  batch = data.CropSampler(settings_, seed).batch(step)
  assert batch.shape == (batchsize, patchsize, patchsize, 3)
  assert batch.dtype == np.uint8
  np.testing.assert_array_equal(
    batch, data.CropSampler({**settings_, "cache_mb": 1 - cache_mb}, seed).batch(step)
  )
  wholes = [s.load() for s in data.resolve(str(textures))]
  for crop in batch[:2]:
    assert any(_contains(w, crop) or (flip and _contains(w, crop[:, ::-1])) for w in wholes)


def _contains(whole, crop):
  side = len(crop)
  tops, lefts = np.nonzero((whole == crop[0, 0]).all(-1))
  return any(np.array_equal(whole[y : y + side, x : x + side], crop) for y, x in zip(tops, lefts))


@pytest.mark.parametrize("patches", [1, 3])
@pytest.mark.parametrize("batchsize", [1, 4, 7])
def test_each_epoch_visits_each_picture_equally(tmp_path, patches, batchsize):
  count = 7
  constant_pictures(tmp_path, count)
  sampler = data.CropSampler(
    config(tmp_path, batchsize=batchsize, patches_per_image=patches), seed=5
  )
  steps = -(-3 * count * patches // batchsize)
  series = np.concatenate([sampler.batch(s)[:, 0, 0, 0] for s in range(steps)])
  epochs = series[: 3 * count * patches].reshape(3, count * patches)
  for epoch in epochs:
    np.testing.assert_array_equal(np.bincount(epoch, minlength=count), patches)
    np.testing.assert_array_equal(epoch.reshape(count, patches).ptp(1), 0)  # Consecutive.
  assert (epochs[0] != epochs[1]).any()


def test_crops_reach_every_place_and_flips_are_half(tmp_path):
  ramp = np.zeros((10, 9, 3), np.uint8)
  ramp[..., 0], ramp[..., 1] = np.arange(10)[:, None], np.arange(9)[None, :]
  save(tmp_path / "a.png", ramp)
  sampler = data.CropSampler(config(tmp_path, batchsize=400, flip=True), 0)
  batch = sampler.batch(0)
  flipped = batch[:, 0, 0, 1] > batch[:, 0, 1, 1]
  assert 150 < flipped.sum() < 250
  left = np.where(flipped, batch[:, 0, -1, 1], batch[:, 0, 0, 1])
  places = set(zip(batch[:, 0, 0, 0].tolist(), left.tolist()))
  assert places == {(y, x) for y in range(3) for x in range(2)}
  unflipped = data.CropSampler(config(tmp_path, batchsize=400), 0).batch(0)
  np.testing.assert_array_equal(np.where(flipped[:, None, None, None], batch[:, :, ::-1], batch),
                                unflipped)  # fmt: skip


def test_broken_pictures_are_replaced_by_the_next(tmp_path, caplog):
  constant_pictures(tmp_path, 6, side=64)
  whole = data.CropSampler(config(tmp_path, batchsize=6), 3).batch(0)[:, 0, 0, 0]
  broken = whole[2]
  path = tmp_path / f"{broken:02d}.png"
  encoded = save(path, noise(64, 64)).read_bytes()
  path.write_bytes(encoded[: len(encoded) // 2])
  for cache_mb in (0, 9):
    caplog.clear()
    sampler = data.CropSampler(config(tmp_path, batchsize=6, cache_mb=cache_mb), 3)
    assert sampler.skipped == {}
    expected = whole.copy()
    expected[2] = whole[3]
    np.testing.assert_array_equal(sampler.batch(0)[:, 0, 0, 0], expected)
    assert list(sampler.skipped) == [path.name]
    assert caplog.text.count(f"Skipped {path.name}") == 1
    sampler.batch(1)
    assert caplog.text.count("Skipped") == 1
    assert path.name not in sampler.names and len(sampler.names) == 5


def test_small_and_headless_pictures_are_skipped_at_once(tmp_path, caplog):
  constant_pictures(tmp_path, 2, side=16)
  save(tmp_path / "low.png", noise(7, 30))
  save(tmp_path / "just.png", noise(8, 8))
  (tmp_path / "junk.jpg").write_bytes(b"junk")
  sampler = data.CropSampler(config(tmp_path), 0)
  assert sorted(sampler.skipped) == ["junk.jpg", "low.png"]
  assert sampler.skipped["low.png"] == "30x7 pixels, smaller than the patch (8)"
  assert "low.png" in caplog.text and "junk.jpg" in caplog.text
  assert sampler.names == ["00.png", "01.png", "just.png"]


def test_no_usable_picture_says_why(tmp_path):
  constant_pictures(tmp_path, 3, side=7)
  with pytest.raises(data.DataError, match=r"3 were skipped.*7x7 pixels, smaller than the patch"):
    data.CropSampler(config(tmp_path), 0)


def test_files_that_vanish(tmp_path, caplog):
  constant_pictures(tmp_path, 4)
  sampler = data.CropSampler(config(tmp_path, cache_mb=0), 0)
  sampler.batch(0)
  (tmp_path / "01.png").unlink()
  assert 1 not in np.concatenate([sampler.batch(s) for s in range(3)])
  assert "Skipped 01.png" in caplog.text and "the file is gone" in caplog.text
  for path in tmp_path.iterdir():
    path.unlink()
  with pytest.raises(data.DataError, match=r"4 were skipped.*the file is gone"):
    sampler.batch(9)
  cached = constant_pictures(tmp_path, 4)
  sampler = data.CropSampler(config(cached), 0)
  before = sampler.batch(0)
  for path in tmp_path.iterdir():
    path.unlink()
  np.testing.assert_array_equal(sampler.batch(0), before)


def test_picture_that_changed_its_size_is_skipped(tmp_path):
  constant_pictures(tmp_path, 3)
  sampler = data.CropSampler(config(tmp_path), 0)
  save(tmp_path / "01.png", noise(9, 9))
  sampler.batch(0)
  assert "another size" in sampler.skipped["01.png"]


def test_cache_stays_in_its_budget(tmp_path):
  for k in range(4):
    save(tmp_path / f"{k}.png", noise(300, 400, k))  # 0.34 MiB each.
  sampler = data.CropSampler(config(tmp_path, batchsize=8, cache_mb=1), 0)
  sampler.batch(0)
  assert len(sampler._cache) == 2
  assert sum(a.nbytes for a in sampler._cache.values()) <= 1 << 20


# --- Splits and settings -------------------------------------------------------------------------


def test_val_split_is_disjoint_complete_and_not_of_the_seed(tmp_path):
  constant_pictures(tmp_path, 10)
  settings_ = config(tmp_path, val_split=0.3)
  val = data.CropSampler(settings_, 0, "val").names
  train = data.CropSampler(settings_, 0).names
  assert len(val) == 3
  assert sorted(train + val) == names(tmp_path)
  assert data.CropSampler(settings_, 99, "val").names == val
  assert data.CropSampler({**settings_, "patchsize": 4}, 0, "val").names == val
  others = [data.CropSampler({**settings_, "val_split_seed": s}, 0, "val").names for s in (1, 2, 3)]
  assert any(other != val for other in others)
  without = config(tmp_path)
  assert data.CropSampler(without, 0).names == data.CropSampler(without, 0, "val").names


def test_max_images_comes_before_the_split(tmp_path):
  constant_pictures(tmp_path, 10)
  settings_ = config(tmp_path, max_images=4, val_split=0.01)
  parts = [data.CropSampler(settings_, 0, split).names for split in ("train", "val")]
  assert [len(p) for p in parts] == [3, 1]
  assert sorted(parts[0] + parts[1]) == names(tmp_path)[:4]


def test_wrong_settings_are_refused(tmp_path):
  constant_pictures(tmp_path, 1)
  with pytest.raises(data.DataError, match=r"unknown: bachsize; missing: batchsize. Known keys: "):
    data.CropSampler({"dataset": str(tmp_path), "bachsize": 3, "patchsize": 8}, 0)
  for wrong in ({"batchsize": 0}, {"patches_per_image": 0}, {"val_split": 1.0}, {"val_split": 0}):
    with pytest.raises(data.DataError, match=next(iter(wrong))):
      data.CropSampler(config(tmp_path, **wrong), 0)
  with pytest.raises(data.DataError, match="needs 2 files"):
    data.CropSampler(config(tmp_path, val_split=0.5), 0)
  with pytest.raises(data.DataError, match="Known: train, val"):
    data.CropSampler(config(tmp_path), 0, "test")


# --- tf.data -------------------------------------------------------------------------------------


def arrays(dataset):
  return [batch.numpy() for batch in dataset]


def test_resumed_dataset_goes_on_like_the_unbroken_one(textures):
  settings_ = ml_collections.ConfigDict(config(textures, patchsize=16, flip=True)).lock()
  unbroken = arrays(data.make_train_dataset(settings_, seed=7, num_steps=8))
  resumed = arrays(data.make_train_dataset(settings_, seed=7, start_step=5, num_steps=3))
  assert len(unbroken) == 8
  np.testing.assert_array_equal(unbroken[5:], resumed)
  endless = data.make_train_dataset(settings_, seed=7, start_step=5)
  np.testing.assert_array_equal(arrays(endless.take(3)), resumed)


def test_batches_have_static_shapes(textures):
  dataset = data.make_train_dataset(config(textures), seed=0)
  assert dataset.element_spec.shape == (4, 8, 8, 3)
  assert dataset.element_spec.dtype == "uint8"


def test_validation_is_finite_and_the_same_every_time(tmp_path):
  constant_pictures(tmp_path, 7)
  settings_ = config(tmp_path, batchsize=4, val_split=0.9)
  first, second = (arrays(data.make_val_dataset(settings_)) for _ in range(2))
  np.testing.assert_array_equal(first, second)
  assert len(first) == 2
  held_out = [int(n[:2]) for n in data.CropSampler(settings_, 0, "val").names]
  shown = np.concatenate(first)[:, 0, 0, 0].tolist()
  assert shown == held_out + held_out[:2]


def test_errors_in_the_pipeline_keep_their_message(tmp_path):
  import tensorflow as tf

  constant_pictures(tmp_path, 2)
  dataset = data.make_train_dataset(config(tmp_path, cache_mb=0), seed=0, num_steps=3)
  for path in tmp_path.iterdir():
    path.unlink()
  with pytest.raises(tf.errors.OpError, match=r"No picture of .* can be used"):
    arrays(dataset)


@pytest.mark.slow
def test_interpreter_ends_while_the_pipeline_works_ahead(tmp_path):
  constant_pictures(tmp_path, 3, side=300)
  code = (
    "import json, sys; from common import data; "
    "batches = iter(data.make_train_dataset(json.loads(sys.argv[1]), 0)); "
    "[next(batches) for _ in range(30)]; print('end')"
  )
  settings_ = json.dumps(config(tmp_path, batchsize=16, patchsize=256))
  done = subprocess.run(
    [sys.executable, "-c", code, settings_],
    cwd=ROOT, capture_output=True, text=True, timeout=60,
    env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
  )  # fmt: skip
  assert done.stdout == "end\n"
  assert done.returncode == 0, done.stderr


# --- Real photographs, where they are present ----------------------------------------------------


@pytest.mark.parametrize("name", ["cid22-train", "bsds500-train"])
def test_real_data_sets_open_fast(name, caplog):
  import time

  if not pathlib.Path(configs.DATASETS[name]).is_dir():
    pytest.skip(f"{name} is not on this machine")
  caplog.set_level(logging.WARNING)
  start = time.perf_counter()
  sampler = data.CropSampler(config(name, patchsize=256, batchsize=8), 0)
  assert time.perf_counter() - start < 1.0
  assert len(sampler.names) == {"cid22-train": 179, "bsds500-train": 200}[name]
  assert sampler.skipped == {} and not caplog.text
