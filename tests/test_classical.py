import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

import configs
from common import bitstream, classical, codec, data, flags, metrics, results


def picture(height, width, seed=0):
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, [height // 8 + 1, width // 8 + 1, 3]).astype(np.uint8)
  return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


class FakeImages:
  """Three pictures; remembers what was asked for."""

  name = "tiny"
  hash = "ab" * 32

  def __init__(self):
    self.loaded = []

  def __len__(self):
    return 3

  def __getitem__(self, index):
    self.loaded.append(index)
    return f"p{index}.png", picture(40 + index, 56, seed=index)


@pytest.fixture
def images(monkeypatch):
  fake = FakeImages()

  def load(dataset):
    if dataset != "tiny":
      raise data.DataError(f"Unknown dataset {dataset!r}. Known: tiny.")
    return fake

  monkeypatch.setattr(data, "load_eval_images", load)
  return fake


@pytest.mark.parametrize("name", list(classical.CODECS))
def test_every_codec_keeps_the_contract(name):
  c = classical.make(name, 75)
  for method in codec.Codec.__abstractmethods__:
    assert callable(getattr(c, method))
  for size in ((1, 1), (7, 5), (17, 33), (64, 48)):
    image = picture(*size)
    file = c.compress(image)
    assert isinstance(file, bytes)
    decoded = c.decompress(file)
    assert decoded.shape == image.shape
    assert decoded.dtype == np.uint8
  assert metrics.psnr_db(image, decoded) > 25


@pytest.mark.parametrize("name", list(classical.CODECS))
def test_higher_quality_costs_more_and_is_better(name):
  image = picture(128, 96)
  files = [classical.make(name, q).compress(image) for q in (10, 50, 90)]
  psnr = [metrics.psnr_db(image, classical.make(name, 1).decompress(f)) for f in files]
  assert sorted(map(len, files)) == list(map(len, files))
  assert sorted(psnr) == psnr


@pytest.mark.parametrize("name", list(classical.CODECS))
def test_files_that_are_not_whole_are_refused(name):
  c = classical.make(name, 75)
  file = c.compress(picture(64, 64))
  for damaged in (b"", b"hello", file[: len(file) // 2], b"\0" * len(file)):
    with pytest.raises(bitstream.BitstreamError):
      c.decompress(damaged)


def test_a_file_of_another_format_is_refused():
  file = classical.make("webp", 75).compress(picture(16, 16))
  with pytest.raises(bitstream.BitstreamError):
    classical.make("jpeg", 75).decompress(file)


def test_jpeg_is_what_pillow_writes_by_default():
  image = picture(64, 80)
  file = io.BytesIO()
  Image.fromarray(image).save(file, "JPEG", quality=60)
  assert classical.make("jpeg", 60).compress(image) == file.getvalue()


@pytest.mark.parametrize("name, sampling", [("jpeg", 2), ("jpeg-optimized", 2), ("jpeg444", 0)])
def test_jpeg_files_have_the_subsampling_of_their_label(name, sampling):
  file = classical.make(name, 50).compress(picture(64, 64))
  assert JpegImagePlugin.get_sampling(Image.open(io.BytesIO(file))) == sampling
  assert ("4:2:0" if sampling else "4:4:4") in classical.CODECS[name].label


def test_optimized_tables_change_the_size_only():
  image = picture(200, 200)
  plain, optimized = classical.make("jpeg", 50), classical.make("jpeg-optimized", 50)
  assert len(optimized.compress(image)) < len(plain.compress(image))
  np.testing.assert_array_equal(
    plain.decompress(optimized.compress(image)), plain.decompress(plain.compress(image))
  )


def test_pictures_too_large_for_the_format_are_refused():
  with pytest.raises(classical.ClassicalError, match="WEBP holds at most 16383"):
    classical.make("webp", 50).compress(np.zeros([1, 16384, 3], np.uint8))


def test_unknown_codecs_and_qualities_name_what_there_is():
  with pytest.raises(classical.ClassicalError, match="Known: jpeg, jpeg-optimized"):
    classical.make("jpg", 50)
  with pytest.raises(classical.ClassicalError, match="jpeg takes 1 to 100, not 101"):
    classical.make("jpeg", 101)


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_picture_is_measured_through_real_bytes(jobs):
  images = FakeImages()
  low, high = classical.evaluate("jpeg", [20, 80], images, jobs)
  assert sorted(images.loaded) == [0, 1, 2]
  assert low.dataset == {
    "name": "tiny", "images": ["p0.png", "p1.png", "p2.png"], "hash": images.hash,
  }  # fmt: skip
  for index, record in enumerate(low.records):
    name, image = images[index]
    file = classical.make("jpeg", 20).compress(image)
    assert record.image == name
    assert record.num_bytes == len(file)
    assert record.num_pixels == image.shape[0] * image.shape[1]
    assert record.bpp == 8 * len(file) / record.num_pixels
    assert record.psnr_db == metrics.psnr_db(image, classical.make("jpeg", 20).decompress(file))
    assert record.bpp_estimated is None
    assert record.seconds_encode > 0 and record.seconds_decode > 0
  assert low.run["family"] == "classical"
  assert (low.run["xid"], low.run["wid"], low.run["runname"]) == ("jpeg", 20, "quality=20")
  assert low.run["label"].startswith("JPEG 4:2:0 (Pillow ")
  assert (low.mode, low.step, low.overrides) == ("bitstream", 0, {})
  assert low.config["versions"]["Pillow"] == Image.__version__
  assert low.config["optimize"] is False
  assert low.mean("psnr_db") < high.mean("psnr_db")


def test_an_error_in_one_picture_ends_the_evaluation():
  class Broken(FakeImages):
    def __getitem__(self, index):
      raise data.DataError("p0.png is broken")

  with pytest.raises(data.DataError, match="broken"):
    classical.evaluate("jpeg", [50], Broken(), 2)


def command(tmp_path, *more):
  classical.run(["--dataset=tiny", f"--results_dir={tmp_path}", "--jobs=1", *more])
  return results.find(tmp_path, "tiny")


def test_the_command_writes_one_file_a_quality(tmp_path, images, capsys):
  paths = command(tmp_path, "--codec=jpeg,webp", "--qualities=30,60")
  assert [p.name for p in paths] == [
    "classical-quality=30-step=0-xid=jpeg-wid=30.json",
    "classical-quality=30-step=0-xid=webp-wid=30.json",
    "classical-quality=60-step=0-xid=jpeg-wid=60.json",
    "classical-quality=60-step=0-xid=webp-wid=60.json",
  ]
  jpeg, webp = results.curves(results.read(p) for p in paths)
  assert (jpeg.group, len(jpeg.bpp)) == ("classical-jpeg", 2)
  assert (webp.group, len(webp.bpp)) == ("classical-webp", 2)
  assert "jpeg q=30" in capsys.readouterr().out


def test_existing_results_are_skipped_unless_something_changed(tmp_path, images):
  command(tmp_path, "--qualities=30")
  images.loaded.clear()
  command(tmp_path, "--qualities=30")
  assert images.loaded == []
  command(tmp_path, "--qualities=30,40")
  assert len(images.loaded) == 3
  command(tmp_path, "--qualities=30", "--skip_existing=false")
  assert len(images.loaded) == 6
  images.hash = "cd" * 32
  command(tmp_path, "--qualities=30")
  assert len(images.loaded) == 9
  for path in results.find(tmp_path, "tiny"):
    path.write_text("torn")
  command(tmp_path, "--qualities=30")
  assert len(images.loaded) == 12


def test_a_codec_whose_library_is_missing_is_named_and_left_out(
  tmp_path, images, monkeypatch, capsys
):
  monkeypatch.setattr(classical.features, "check", lambda feature: feature != "webp")
  paths = command(tmp_path, "--codec=jpeg,webp", "--qualities=50")
  assert len(paths) == 1
  assert "Left out webp: this Pillow was built without libwebp" in capsys.readouterr().err
  with pytest.raises(classical.ClassicalError, match="No codec is left"):
    command(tmp_path, "--codec=webp")


@pytest.mark.parametrize(
  "argv, error, words",
  [
    ([], flags.UsageError, "--dataset is needed. Known: .*sample"),
    (["--dataset=none"], data.DataError, "Known: tiny"),
    (["--dataset=tiny", "--codec=gif"], classical.ClassicalError, "Known: jpeg"),
    (["--dataset=tiny", "--qualities=high"], flags.UsageError, "whole numbers"),
    (["--dataset=tiny", "--qualities=0"], classical.ClassicalError, "1 to 100"),
    (["--dataset=tiny", "--jobs=-1"], flags.UsageError, "1 or more"),
  ],
)
def test_wrong_commands_name_the_fix(images, argv, error, words):
  with pytest.raises(error, match=words):
    classical.run(argv)


def test_the_command_runs_on_the_sample_photographs_without_tensorflow(tmp_path):
  program = (
    "import sys; from common import classical; "
    f"classical.run(['--dataset=sample', '--qualities=50', '--results_dir={tmp_path}']); "
    "assert not any(m.split('.')[0] == 'tensorflow' for m in sys.modules)"
  )
  # LPIPS is computed with TensorFlow, where there are weights.
  environment = {**os.environ, "NTC_LPIPS_WEIGHTS": str(tmp_path / "none.npz")}
  subprocess.run(
    [sys.executable, "-c", program], check=True, cwd=configs.PROJECT_DIR, env=environment
  )
  (path,) = results.find(tmp_path, "sample")
  result = results.read(path)
  assert 0.3 < result.mean("bpp") < 2
  assert 27 < result.mean("psnr_db") < 40
  assert result.mean("msssim") > 0.95


def test_a_measurement_that_was_broken_off_goes_on(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(classical.data, "load_eval_images", lambda dataset: FakeImages())
  argv = ["--dataset=tiny", "--codec=jpeg", "--qualities=30,60", f"--results_dir={tmp_path}"]
  append, measure, measured = results.Partial.append, classical.measure, []

  def broken(self, record):
    append(self, record)
    if len(self.records) == 2:
      raise OSError("stop")

  def counted(codec, name, *rest):
    measured.append((codec.options["quality"], name))
    return measure(codec, name, *rest)

  monkeypatch.setattr(classical, "measure", counted)
  monkeypatch.setattr(results.Partial, "append", broken)
  with pytest.raises(OSError, match="stop"):
    classical.run([*argv, "--jobs=1"])
  assert len(list(tmp_path.rglob("*.partial"))) == 2 and not list(tmp_path.rglob("*.json"))
  monkeypatch.setattr(results.Partial, "append", append)
  measured.clear()
  classical.run([*argv, "--jobs=2"])
  # Quality 30 of the second picture was kept, and that of 60 not.
  assert len(measured) == 3 and not list(tmp_path.rglob("*.partial"))
  again = [results.read(p) for p in sorted(tmp_path.rglob("*.json"))]
  classical.run([*argv, "--skip_existing=false"])
  assert len(measured) == 9
  anew = [results.read(p) for p in sorted(tmp_path.rglob("*.json"))]
  for a, b in zip(again, anew):
    assert [(r.image, r.num_bytes, r.mse) for r in a.records] == [
      (r.image, r.num_bytes, r.mse) for r in b.records
    ]
