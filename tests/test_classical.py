import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

import configs
from common import bitstream, classical, codec, data, flags, metrics, programs, results
from tests import fake_codecs


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


@pytest.fixture(scope="module", autouse=True)
def fake_programs(tmp_path_factory):
  """BPG and VTM are on PATH, unless a test takes them away."""
  with pytest.MonkeyPatch.context() as m:
    found = fake_codecs.install(tmp_path_factory.mktemp("vtm"))
    m.setenv("PATH", f"{found}{os.pathsep}{os.environ['PATH']}")
    yield found


def good(name):
  """A high quality, but not the highest."""
  return 75 * classical.CODECS[name].highest // 100


@pytest.mark.parametrize("name", list(classical.CODECS))
def test_every_codec_keeps_the_contract(name):
  c = classical.make(name, good(name))
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


@pytest.mark.slow
@pytest.mark.parametrize("name", list(classical.CODECS))
def test_higher_quality_costs_more_and_is_better(name):
  image = picture(128, 96)
  highest = classical.CODECS[name].highest
  qualities = [q * highest // 100 for q in (10, 50, 90)]
  files = [classical.make(name, q).compress(image) for q in qualities]
  psnr = [metrics.psnr_db(image, classical.make(name, 1).decompress(f)) for f in files]
  assert sorted(map(len, files)) == list(map(len, files))
  assert sorted(psnr) == psnr


@pytest.mark.slow
@pytest.mark.parametrize("name", list(classical.CODECS))
def test_files_that_are_not_whole_are_refused(name):
  c = classical.make(name, good(name))
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


def test_programs_that_are_not_there_are_named_and_left_out(tmp_path, images, monkeypatch, capsys):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert len(command(tmp_path, "--codec=jpeg,bpg,vtm", "--qualities=50")) == 1
  said = capsys.readouterr().err
  assert "Left out bpg: the program bpgenc is not on PATH" in said
  assert "Left out vtm: the program EncoderApp or EncoderAppStatic is not on PATH" in said


def test_vtm_without_its_configuration_names_the_setting(fake_programs, monkeypatch, tmp_path):
  monkeypatch.setenv("NTC_VTM_CONFIG", str(tmp_path / "none.cfg"))
  assert "set NTC_VTM_CONFIG" in classical.missing("vtm")
  monkeypatch.delenv("NTC_VTM_CONFIG")
  assert classical.missing("vtm") is None


@pytest.mark.slow
def test_programs_are_measured_as_other_codecs_with_their_versions(tmp_path, images):
  paths = command(tmp_path, "--codec=bpg,vtm", "--qualities=0,40", "--nolpips")
  found = [results.read(p) for p in paths]
  assert {r.run["label"] for r in found} == {
    "BPG 4:4:4 (bpgenc 0.9.8)", "VTM 4:4:4, intra (VTM 23.4)",
  }  # fmt: skip
  assert all(record.num_bytes and record.psnr_db for r in found for record in r.records)
  with pytest.raises(classical.ClassicalError, match="bpg takes 0 to 51, not 52"):
    classical.make("bpg", 52)


def test_a_program_that_fails_says_its_last_words(monkeypatch, tmp_path):
  failing = tmp_path / "bpgenc"
  failing.write_text("#!/bin/sh\necho 'no memory' >&2\nexit 3\n")
  failing.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
  with pytest.raises(classical.ClassicalError, match="bpgenc ended with 3: no memory"):
    classical.make("bpg", 20).compress(picture(8, 8))


def test_colours_for_vtm_are_rounded_and_come_back():
  image = np.random.default_rng(0).integers(0, 256, [200, 300, 3]).astype(np.uint8)
  difference = programs.to_rgb(programs.to_ycbcr(image)).astype(int) - image
  assert np.max(np.abs(difference)) <= 2
  assert np.all(np.abs(difference.mean((0, 1))) < 0.02)  # Truncation has half a level.
  grey = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, 2)
  np.testing.assert_array_equal(programs.to_ycbcr(grey)[:, 0, 0], np.arange(256))
  assert np.all(programs.to_ycbcr(grey)[..., 1:] == 128)


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
