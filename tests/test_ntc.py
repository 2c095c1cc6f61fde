"""The command for people: pictures to files and back, exports, and errors that name the fix."""

import dataclasses
import errno
import functools
import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import configs
import ntc
from common import artefacts, bitstream, data, eval_lib, runs
from common.codec import TrainableCodec
from factorized.codec import FactorizedCodec
from tests.conftest import ROOT, picture


@dataclasses.dataclass
class Command:
  """Calls ntc.main within this process."""

  capsys: pytest.CaptureFixture
  out: str = ""
  err: str = ""

  def __call__(self, *argv):
    self.capsys.readouterr()  # What a fixture's training and export said.
    code = ntc.main([str(a) for a in argv])
    self.out, self.err = self.capsys.readouterr()
    assert "Traceback" not in self.err
    return code

  def fails(self, code, *argv):
    """The one line that it says."""
    assert self(*argv) == code
    (line,) = self.err.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
  monkeypatch.setattr(configs, "MODELS_DIR", tmp_path / "no models")
  monkeypatch.setattr(configs, "EXAMPLE_MODEL", tmp_path / "no models" / "example.ntcm")
  return Command(capsys)


@dataclasses.dataclass
class Made:
  """What the tests of a family start from.

  Attributes:
    run: Trained; its newest checkpoint is the codec's.
    codec: Coding with it.
    photo: A folder with photo.png, its file photo.ntc, and that file decoded, decoded.png.
    models: A models folder with an export of a copy of the run that is gone.
  """

  run: runs.RunDir
  codec: TrainableCodec
  photo: pathlib.Path
  models: pathlib.Path


def _build(family):
  return importlib.import_module(f"{family}.codec").build


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
  """From a family to its `Made`; each is made when it is first asked for."""

  @functools.cache
  def make(family):
    fixture = {"factorized": "trained_run", "mshyper": "trained_hyperprior_run"}[family]
    run = request.getfixturevalue(fixture)
    codec = eval_lib.load_codec(run, _build(family))[0]
    photo = tmp_path_factory.mktemp("photo")
    Image.fromarray(picture(40, 56)).save(photo / "photo.png")
    content = codec.compress(picture(40, 56))
    (photo / "photo.ntc").write_bytes(content)
    Image.fromarray(codec.decompress(content)).save(photo / "decoded.png")
    models = tmp_path_factory.mktemp("models")
    copy = tmp_path_factory.mktemp("runs") / run.path.name
    shutil.copytree(run.path, copy)
    assert ntc.main(["export", str(copy), "--output", str(models / "model.ntcm")]) == 0
    shutil.rmtree(copy)
    return Made(run, codec, photo, models)

  return make


# Tests of what reads a codec's own sections, weights and tables; the others take the smaller one.
of_both_families = pytest.mark.parametrize("family", ["factorized", "mshyper"], indirect=True)


@pytest.fixture
def family(request):
  return getattr(request, "param", "factorized")


@pytest.fixture
def run(made, family):
  return made(family).run


@pytest.fixture
def codec(made, family):
  return made(family).codec


@pytest.fixture
def photo(made, family):
  return made(family).photo


@pytest.fixture
def models(made, family):
  return made(family).models


def _pixels(path):
  return np.asarray(Image.open(path))


def _files(folder):
  return sorted(p.name for p in folder.iterdir())


# There and back


@pytest.mark.slow
@of_both_families
def test_a_picture_there_and_back_by_a_run(command, photo, run, tmp_path, codec):
  file, back = tmp_path / "photo.ntc", tmp_path / "back.png"
  assert command("compress", photo / "photo.png", file, "--workdir", run.path) == 0
  assert file.read_bytes() == (photo / "photo.ntc").read_bytes()
  size = file.stat().st_size
  assert f"{size} bytes, {8 * size / 40 / 56:.3f} bpp" in command.out and " dB" in command.out
  assert command("decompress", f"--workdir={run.path}", file, back) == 0
  np.testing.assert_array_equal(_pixels(back), _pixels(photo / "decoded.png"))


def test_without_a_model_the_example_model_compresses_and_decodes(
  command, photo, models, tmp_path, monkeypatch
):
  example = models / "model.ntcm"
  monkeypatch.setattr(configs, "EXAMPLE_MODEL", example)
  file, back = tmp_path / "photo.ntc", tmp_path / "back.png"
  assert command("compress", photo / "photo.png", file) == 0
  assert "with the example model" in command.err and str(example) in command.err
  assert file.read_bytes() == (photo / "photo.ntc").read_bytes()
  assert command("decompress", file, back) == 0
  np.testing.assert_array_equal(_pixels(back), _pixels(photo / "decoded.png"))
  assert command("info", file) == 0 and str(example) in command.out


def test_the_example_model_that_ships_compresses_and_decodes(capsys, photo, tmp_path):
  assert 1e6 < configs.EXAMPLE_MODEL.stat().st_size < 10e6
  command, file, back = Command(capsys), tmp_path / "photo.ntc", tmp_path / "back.png"
  assert command("compress", photo / "photo.png", file) == 0
  assert command("decompress", file, back) == 0
  error = _pixels(back).astype(float) - _pixels(photo / "photo.png")
  assert 10 * np.log10(255**2 / np.mean(error**2)) > 20


def test_an_export_of_half_the_size_codes_alike(command, run, models, photo, tmp_path):
  half, file, back = tmp_path / "half.ntcm", tmp_path / "photo.ntc", tmp_path / "back.png"
  assert command("export", run.path, "--half", "--output", half) == 0
  assert half.stat().st_size < 0.7 * (models / "model.ntcm").stat().st_size
  assert command("compress", photo / "photo.png", file, "--model", half) == 0
  assert command("decompress", file, back, "--model", half) == 0
  difference = _pixels(back).astype(int) - _pixels(photo / "decoded.png")
  assert np.mean(np.abs(difference)) < 1.0


@pytest.mark.slow
@of_both_families
def test_many_pictures_of_all_kinds_by_an_exported_model(
  command, models, odd_pictures, tmp_path, codec, monkeypatch
):
  folder = tmp_path / "in"
  shutil.copytree(odd_pictures, folder)
  rgb = Image.fromarray(picture(20, 30))
  alpha = Image.fromarray(np.linspace(0, 255, 600).reshape(20, 30).astype(np.uint8))
  rgb.convert("L").save(folder / "grey.png")
  rgb.convert("CMYK").save(folder / "cmyk.jpg")
  rgb.convert("P").save(folder / "palette.gif")
  Image.merge("RGBA", [*rgb.split(), alpha]).save(folder / "alpha.png")
  Image.fromarray(picture(20, 30)[:, :, 0].astype(np.uint16) * 257).save(folder / "wide.png")
  pictures = sorted(folder.iterdir())
  files, back = tmp_path / "files", tmp_path / "back"
  model = ["--model", models / "model.ntcm"]
  assert command("compress", *pictures, "--output_dir", files, *model) == 0
  assert len(command.out.splitlines()) == len(pictures)
  assert _files(files) == [f"{p.stem}.ntc" for p in pictures]
  monkeypatch.setattr(configs, "MODELS_DIR", models)
  assert command("decompress", *sorted(files.iterdir()), "--output_dir", back) == 0
  for path in pictures:
    content = (files / f"{path.stem}.ntc").read_bytes()
    assert content == codec.compress(data.read_image(path)), path.name
    np.testing.assert_array_equal(_pixels(back / f"{path.stem}.png"), codec.decompress(content))


@pytest.mark.slow
@of_both_families
def test_the_exported_model_decodes_in_a_fresh_process(photo, models, tmp_path):
  back = tmp_path / "back.png"
  subprocess.run(
    [ROOT / "ntc.py", "decompress", photo / "photo.ntc", back],
    env={**os.environ, "NTC_MODELS_DIR": str(models)}, cwd=tmp_path, check=True,
  )  # fmt: skip
  np.testing.assert_array_equal(_pixels(back), _pixels(photo / "decoded.png"))


@pytest.mark.parametrize("suffix", [".bmp", ".ppm", ".tif"])
def test_other_formats_keep_every_pixel(command, photo, models, tmp_path, suffix):
  back = tmp_path / f"back{suffix}"
  model = ["--model", models / "model.ntcm"]
  assert command("decompress", photo / "photo.ntc", back, *model) == 0
  np.testing.assert_array_equal(_pixels(back), _pixels(photo / "decoded.png"))


@pytest.mark.slow
@of_both_families
def test_an_older_checkpoint_that_wrote_a_file_is_found_and_named(
  command, family, photo, run, tmp_path
):
  workdir = ["--workdir", run.path]
  file, back = tmp_path / "old.ntc", tmp_path / "old.png"
  assert command("compress", photo / "photo.png", file, *workdir, "--step=2") == 0
  assert file.read_bytes() != (photo / "photo.ntc").read_bytes()
  # Together with one of the newest checkpoint: every model is loaded once.
  assert command("decompress", file, photo / "photo.ntc", "--output_dir", tmp_path, *workdir) == 0
  assert "was written by step 2" in command.err
  old = eval_lib.load_codec(run, _build(family), "2")[0]
  np.testing.assert_array_equal(_pixels(back), old.decompress(file.read_bytes()))
  np.testing.assert_array_equal(_pixels(tmp_path / "photo.png"), _pixels(photo / "decoded.png"))
  said = command.fails(1, "decompress", file, tmp_path / "x.png", *workdir, "--step", "6")
  assert old.fingerprint.hex() in said and "step 6 is" in said
  assert not (tmp_path / "x.png").exists()


# Exports


@pytest.mark.slow
@of_both_families
def test_export_has_a_name_of_its_own_and_does_not_write_twice(
  command, family, run, tmp_path, monkeypatch
):
  monkeypatch.setattr(configs, "MODELS_DIR", tmp_path / "models")
  assert command("export", run.path, "--step", "best") == 0
  (path,) = (tmp_path / "models").iterdir()
  model = artefacts.read(path).model
  unit = run.read_work_unit()
  assert path.name == f"{family}-{unit.runname}-{model['fingerprint']}.ntcm"
  assert model["training"]["xid"] == "1" and model["training"]["wid"] == unit.wid
  before = path.stat().st_mtime_ns
  assert command("export", run.path, "--step", "best") == 0
  assert "the same" in command.out and path.stat().st_mtime_ns == before
  path.write_bytes(b"something else")
  assert "--force" in command.fails(2, "export", run.path, "--step", "best")
  assert path.read_bytes() == b"something else"


@pytest.mark.slow
@of_both_families
def test_an_exported_decoder_decodes_and_says_that_it_cannot_compress(
  command, photo, run, tmp_path, models
):
  model, back = tmp_path / "decoder.ntcm", tmp_path / "back.png"
  assert command("export", run.path, "--decoder_only", "--output", model) == 0
  assert model.stat().st_size < (models / "model.ntcm").stat().st_size
  assert command("decompress", photo / "photo.ntc", back, "--model", model) == 0
  np.testing.assert_array_equal(_pixels(back), _pixels(photo / "decoded.png"))
  said = command.fails(1, "compress", photo / "photo.png", tmp_path / "x.ntc", "--model", model)
  assert "without --decoder_only" in said


# Models that are missing or wrong


def test_a_missing_model_is_named_with_where_it_was_looked_for(command, photo, codec, tmp_path):
  said = command.fails(1, "decompress", photo / "photo.ntc", tmp_path / "x.png")
  for part in (codec.fingerprint.hex(), str(configs.MODELS_DIR), "ntc.py export", "--workdir"):
    assert part in said


def test_a_damaged_model_in_the_folder_is_named(command, photo, models, tmp_path, monkeypatch):
  content = bytearray((models / "model.ntcm").read_bytes())
  content[len(content) // 2] ^= 1
  (tmp_path / "model.ntcm").write_bytes(content)
  monkeypatch.setattr(configs, "MODELS_DIR", tmp_path)
  argv = ["decompress", photo / "photo.ntc", tmp_path / "x.png"]
  named = ["--model", tmp_path / "model.ntcm"]
  for refused in (argv, [*argv, *named], ["info", tmp_path / "model.ntcm"]):
    said = command.fails(1, *refused)
    assert "SHA-256" in said and "model.ntcm" in said
  assert _files(tmp_path) == ["model.ntcm"]


def _with(photo, tmp_path, **changes):
  stream = bitstream.read((photo / "photo.ntc").read_bytes())
  path = tmp_path / "changed.ntc"
  path.write_bytes(bitstream.write(dataclasses.replace(stream, **changes)))
  return path


def test_another_models_file_is_refused(command, photo, models, run, tmp_path):
  file = _with(photo, tmp_path, fingerprint=b"\1" * 6)
  for model in (["--workdir", run.path], ["--model", models / "model.ntcm"]):
    said = command.fails(1, "decompress", file, tmp_path / "x.png", *model)
    assert "010101010101" in said and "Name the run" in said
  assert _files(tmp_path) == ["changed.ntc"]


def test_another_familys_file_is_refused(command, photo, models, run, tmp_path):
  file = _with(photo, tmp_path, family="../os")
  for model in (["--workdir", run.path], ["--model", models / "model.ntcm"]):
    said = command.fails(1, "decompress", file, tmp_path / "x.png", *model)
    assert "by the family '../os'" in said and "'factorized'" in said
  assert "../os model" in command.fails(1, "decompress", file, tmp_path / "x.png")


@pytest.mark.slow
@of_both_families
def test_the_other_familys_model_is_refused_for_a_file(command, made, family, photo, tmp_path):
  other = {"factorized": "mshyper", "mshyper": "factorized"}[family]
  for model in (
    ["--workdir", made(other).run.path],
    ["--model", made(other).models / "model.ntcm"],
  ):
    said = command.fails(1, "decompress", photo / "photo.ntc", tmp_path / "x.png", *model)
    assert f"by the family {family!r}" in said and repr(other) in said
  assert _files(tmp_path) == []


def test_a_model_of_a_family_that_is_not_here_is_refused(command, photo, tmp_path):
  model = {
    "schema_version": artefacts.SCHEMA_VERSION, "family": "os", "fingerprint": "00" * 6,
    "decoder_only": False, "model_config": {}, "step": 1, "training": {}, "versions": {},
    "arrays": {},
  }  # fmt: skip
  path = tmp_path / "odd.ntcm"
  path.write_bytes(artefacts.seal({"model.json": runs.json_line(model).encode()}))
  said = command.fails(1, "compress", photo / "photo.png", tmp_path / "x.ntc", "--model", path)
  assert "'os'" in said and "factorized" in said


# Damaged files and pictures


def test_damaged_files_are_refused_and_leave_nothing(command, photo, models, tmp_path, monkeypatch):
  monkeypatch.setattr(configs, "MODELS_DIR", models)
  content = (photo / "photo.ntc").read_bytes()
  flipped = bytearray(content)
  flipped[-5] ^= 1
  own = bitstream.FORMAT_VERSION
  future = content[:3] + bytes([own + 1]) + content[4:]
  damaged = {
    "flipped": (bytes(flipped), "checksum"),
    "short": (content[:-3], "truncated"),
    "empty": (b"", "truncated"),
    "text": (b"no such file", "magic"),
    "future": (future, f"version {own + 1}; this code reads {own}"),
  }
  for name, (changed, message) in damaged.items():
    file = tmp_path / f"{name}.ntc"
    file.write_bytes(changed)
    for argv in (["decompress", file, tmp_path / "x.png"], ["info", file]):
      said = command.fails(1, *argv)
      assert message in said and file.name in said
  assert all(name.endswith(".ntc") for name in _files(tmp_path))


def test_one_bad_picture_does_not_hold_up_the_others(command, photo, models, tmp_path):
  good, bad, out = photo / "photo.png", tmp_path / "bad.png", tmp_path / "out"
  bad.write_bytes(good.read_bytes()[:200])
  model = ["--model", models / "model.ntcm"]
  assert command("compress", bad, good, "--output_dir", out, *model) == 1
  assert "bad.png is no picture" in command.err and "1 of 2 files" in command.err
  assert _files(out) == ["photo.ntc"]


def test_a_picture_beyond_the_limit_is_refused_unread(command, models, tmp_path, monkeypatch):
  Image.new("L", (20, 20)).save(tmp_path / "large.png")
  monkeypatch.setattr(bitstream, "MAX_PIXELS", 399)
  monkeypatch.setattr(data, "read_image", None)
  argv = ["compress", tmp_path / "large.png", tmp_path / "x.ntc", "--model", models / "model.ntcm"]
  assert "Cut it" in command.fails(1, *argv)


def test_a_file_that_does_not_decode_is_not_left_behind(
  command, photo, models, tmp_path, monkeypatch
):
  def decompress(self, content):
    raise bitstream.BitstreamError("out of step")

  monkeypatch.setattr(FactorizedCodec, "decompress", decompress)
  argv = ["compress", photo / "photo.png", tmp_path / "x.ntc", "--model", models / "model.ntcm"]
  assert "out of step" in command.fails(1, *argv)
  assert _files(tmp_path) == []
  assert command(*argv, "--noverify") == 0
  assert _files(tmp_path) == ["x.ntc"] and "not verified" in command.out


def test_a_full_disk_leaves_nothing_and_what_was_there(
  command, photo, models, run, tmp_path, monkeypatch
):
  def fsync(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(runs.os, "fsync", fsync)
  file = tmp_path / "x.ntc"
  model = ["--model", models / "model.ntcm"]
  for argv in (
    ["compress", photo / "photo.png", file, *model],
    ["decompress", photo / "photo.ntc", tmp_path / "x.png", *model],
    ["export", run.path, "--output", tmp_path / "x.ntcm"],
  ):
    assert "No space left" in command.fails(1, *argv)
    assert _files(tmp_path) == []
  file.write_bytes(b"before")
  assert "x.ntc: No space" in command.fails(
    1, "compress", photo / "photo.png", file, "--force", *model
  )
  assert file.read_bytes() == b"before" and _files(tmp_path) == ["x.ntc"]


# The command line


def test_existing_files_stay_without_force(command, photo, models, tmp_path):
  target, model = tmp_path / "photo.ntc", ["--model", models / "model.ntcm"]
  target.write_bytes(b"mine")
  assert "--force" in command.fails(2, "compress", photo / "photo.png", target, *model)
  assert "--force" in command.fails(
    2, "compress", photo / "photo.png", "--output_dir", tmp_path, *model
  )
  assert target.read_bytes() == b"mine"
  assert command("compress", photo / "photo.png", target, *model, "--force") == 0
  assert target.read_bytes() == (photo / "photo.ntc").read_bytes()


def test_pipes_devices_and_links_are_not_replaced(command, photo, models, run, tmp_path):
  pipe, link = tmp_path / "pipe.png", tmp_path / "link.png"
  os.mkfifo(pipe)
  link.symlink_to("nowhere.png")
  argv = ["decompress", photo / "photo.ntc"]
  model = ["--model", models / "model.ntcm"]
  assert "no regular file" in command.fails(2, *argv, pipe, *model, "--force")
  assert "--force" in command.fails(2, *argv, link, *model)
  assert pipe.is_fifo() and link.is_symlink() and len(_files(tmp_path)) == 2


def test_wrong_command_lines_exit_2_and_write_nothing(
  command, photo, models, run, tmp_path, monkeypatch
):
  def never():
    raise AssertionError("TensorFlow was started for a wrong command line")

  monkeypatch.setattr(ntc, "_start_tensorflow", never)
  image, file, out = photo / "photo.png", photo / "photo.ntc", tmp_path / "out.ntc"
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "photo.jpg").write_bytes(image.read_bytes())
  model, workdir = ["--model", models / "model.ntcm"], ["--workdir", run.path]
  for said, *argv in [
    ("Unknown command 'pack'", "pack", image),
    ("Which model?", "compress", image, out),
    ("give one of them", "compress", image, out, *model, *workdir),
    ("goes with --workdir", "compress", image, out, *model, "--step", "2"),
    ("No model file", "compress", image, out, "--model", "nothing.ntcm"),
    ("No run directory", "compress", image, out, "--workdir", "nothing"),
    ("No run directory", "decompress", file, tmp_path / "x.png", "--workdir", "nothing"),
    ("1 file: name an input and an output", "compress", image, *model),
    ("3 files: name", "compress", image, image, out, *model),
    ("named like a picture", "compress", image, tmp_path / "b.png", *model),
    ("does not exist", "compress", tmp_path / "no.png", out, *model),
    ("is a folder: name its files", "compress", tmp_path, out, *model),
    ("write --output_dir", "compress", image, tmp_path, *model),
    ("is no folder", "compress", image, "--output_dir", image, *model),
    ("no folder does not exist. Make it", "compress", image, tmp_path / "no folder/x.ntc", *model),
    ("rename one", "compress", image, tmp_path / "other/photo.jpg", "--output_dir", "o", *model),
    ("input and output at once", "decompress", file, file, "--force", *workdir),
    ("gone/deep does not exist. Make it", "decompress", file, tmp_path / "gone/deep/x.png", *model),
    ("photo.jpg is no folder", "decompress", file, tmp_path / "other/photo.jpg/x.png", *model),
    ("keep every pixel", "decompress", file, tmp_path / "x.jpg", *workdir),
    ("--bogus", "compress", image, out, "--bogus"),
    ("required: RUN", "export"),
    ("end in .ntcm", "export", run.path, "--output", tmp_path / "x.zip"),
    ("does not exist. Make it", "export", run.path, "--output", tmp_path / "gone/x.ntcm"),
    ("No run directory", "export", "nothing"),
    ("required: FILE", "info"),
  ]:
    assert said in command.fails(2, *argv), argv
  assert _files(tmp_path) == ["other"]


def test_a_step_that_is_not_there_names_those_that_are(command, run, tmp_path):
  said = command.fails(1, "export", run.path, "--step", "5")
  assert "no checkpoint of step 5" in said and "[2, 3, 4, 6]" in said


# Information


@of_both_families
def test_info_of_a_file(command, family, photo, models, codec, monkeypatch):
  file = photo / "photo.ntc"
  assert command("info", file) == 0
  size, stream = file.stat().st_size, bitstream.read(file.read_bytes())
  sections = [len(section) for section in stream.sections]
  assert len(sections) == {"factorized": 1, "mshyper": 2}[family]
  said = command.out
  for part in (family, codec.fingerprint.hex(), "56x40 pixels",
               ", ".join(f"{section} bytes" for section in sections),
               f"{size - sum(sections)} bytes", f"{8 * size / 40 / 56:.4f}", "not in"):  # fmt: skip
    assert part in said
  monkeypatch.setattr(configs, "MODELS_DIR", models)
  assert command("info", file, models / "model.ntcm") == 0
  assert str(models / "model.ntcm") in command.out


@of_both_families
def test_info_of_a_model(command, family, models, codec, run):
  path = models / "model.ntcm"
  assert command("info", path) == 0
  facts = dict(line.split(None, 1) for line in command.out.splitlines()[1:] if "config" not in line)
  unit = run.read_work_unit()
  assert facts["family"] == family and facts["fingerprint"] == codec.fingerprint.hex()
  assert facts["step"] == "6" and facts["xid"] == "1" and facts["wid"] == str(unit.wid)
  assert facts["runname"] == unit.runname and facts["bytes"] == str(path.stat().st_size)
  numbers = sum(int(np.prod(v.shape)) for v in codec.variables)
  assert f"{numbers} numbers, {4 * numbers} bytes" in facts["weights"]
  width = {"factorized": "num_filters", "mshyper": "channels_base"}[family]
  assert f"config       analysis.{width}=6" in command.out


def _runs_within(seconds, argv):
  """A command's output; it has a few attempts, for the machine may have other work."""
  took = []
  while not took or (min(took) >= seconds and len(took) < 6):
    began = time.perf_counter()
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    took.append(time.perf_counter() - began)
  assert min(took) < seconds
  return done.stdout


def test_info_and_help_start_at_once_and_without_tensorflow(photo, models):
  names = [str(photo / "photo.ntc"), str(models / "model.ntcm")]
  code = (
    f"import sys, ntc; ntc.main(['info', *{names}]);"
    "assert not [m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'keras', 'PIL')]"
  )
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
  assert "40" in _runs_within(0.5, [sys.executable, "ntc.py", "info", *names])
  assert "./ntc.py export" in _runs_within(0.5, [sys.executable, "ntc.py", "--help"])
  assert "--noverify" in _runs_within(0.5, [sys.executable, "ntc.py", "compress", "--help"])
  assert os.access(ROOT / "ntc.py", os.X_OK)
