"""Evaluation: real bytes, records of each image, files that say where they come from."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from common import checkpoints, cli, data, eval_lib, results, runs
from factorized.codec import build
from tests.conftest import ROOT, picture, run_command, tiny_arguments, train


def _evaluate(argv):
  from factorized import eval as entry

  return run_command(cli.eval_main, "factorized", entry.run, argv)


def _results(folder):
  return [results.read(p) for p in sorted(folder.glob("*/*/*.json"))]


@pytest.fixture(scope="module")
def evaluated(trained_run, odd_pictures, tmp_path_factory):
  folder = tmp_path_factory.mktemp("results")
  argv = ["--workdir", str(trained_run.path), "--dataset", str(odd_pictures)]
  argv += ["--results_dir", str(folder), "--save_dir", str(folder / "saved")]
  assert _evaluate([*argv, "--job_dir", str(folder / "job")]) == 0
  return folder


def test_records_hold_real_bytes_of_every_image(evaluated, odd_pictures, trained_run):
  (result,) = _results(evaluated)
  assert [r.image for r in result.records] == sorted(p.name for p in odd_pictures.iterdir())
  assert result.mode == "bitstream" and result.step == 6
  assert result.config["model_config"]["rd_lambda"] == 0.01
  assert result.run["family"] == "factorized" and result.run["xid"] == "1"
  for record in result.records:
    stem = record.image.rsplit(".", 1)[0]
    file = evaluated / "saved" / f"{stem}.ntc"
    assert record.num_bytes == file.stat().st_size
    assert record.bpp == 8 * record.num_bytes / record.num_pixels
    assert 0 < record.bpp_estimated < record.bpp
    assert record.seconds_encode > 0 and record.seconds_decode > 0
    original = np.asarray(Image.open(odd_pictures / record.image), np.float64)
    decoded = np.asarray(Image.open(evaluated / "saved" / f"{stem}.png"), np.float64)
    mse = np.mean((original - decoded) ** 2)
    assert record.mse == pytest.approx(mse)
    assert record.psnr_db == pytest.approx(10 * np.log10(255**2 / mse))


@pytest.mark.slow
def test_saved_files_decode_in_a_codec_loaded_anew(evaluated, trained_run):
  codec, _ = eval_lib.load_codec(trained_run, build)
  for file in sorted((evaluated / "saved").glob("*.ntc")):
    decoded = np.asarray(Image.open(file.with_suffix(".png")))
    np.testing.assert_array_equal(codec.decompress(file.read_bytes()), decoded)


def test_the_launcher_sees_that_it_is_done(evaluated):
  state = runs.RunDir(evaluated / "job").read_state()
  assert state["state"] == "DONE" and state["result"].endswith(".json")


def test_the_file_says_what_it_is(evaluated):
  (path,) = evaluated.glob("*/*/*.json")
  record = json.loads(path.read_text())
  assert path.parent.name == "bitstream"
  assert path.name.startswith("factorized-rd_lambda=0.01-") and "-xid=1-wid=0" in path.name
  assert record["schema_version"] == results.SCHEMA_VERSION
  assert record["dataset"]["hash"]


def test_existing_results_are_skipped_unless_asked_or_of_other_pictures(
  evaluated, trained_run, odd_pictures, tmp_path
):
  argv = ["--workdir", str(trained_run.path), "--dataset", str(odd_pictures)]
  argv += ["--results_dir", str(evaluated)]
  (path,) = evaluated.glob("*/*/*.json")
  before = path.stat().st_mtime_ns
  assert _evaluate(argv) == 0
  assert path.stat().st_mtime_ns == before
  assert _evaluate([*argv, "--skip_existing=false"]) == 0
  assert path.stat().st_mtime_ns > before


@pytest.mark.slow
def test_another_runs_results_are_never_taken_for_ones_own(
  evaluated, trained_run, odd_pictures, pictures, tmp_path, capsys
):
  """Same xid, wid and name in another experiments folder, other weights."""
  argv = tiny_arguments(pictures, tmp_path, "--xid", "1", "--config.train_eval_config.seed=5")
  assert train(argv) == 0
  (path,) = tmp_path.glob("1/wid=*")
  (file,) = evaluated.glob("*/*/*.json")
  before = file.read_bytes()
  arguments = ["--dataset", str(odd_pictures), "--results_dir", str(evaluated)]
  assert _evaluate(["--workdir", str(path), *arguments]) == 1
  assert "results of another run" in capsys.readouterr().err
  assert file.read_bytes() == before


@pytest.mark.slow
def test_a_run_trained_anew_in_the_same_place_is_evaluated_anew(pictures, tmp_path):
  import shutil

  rates = []
  for seed in (5, 6):
    shutil.rmtree(tmp_path / "xms", ignore_errors=True)
    argv = tiny_arguments(
      pictures, tmp_path / "xms", "--xid", "1", f"--config.train_eval_config.seed={seed}"
    )
    assert train(argv) == 0
    (path,) = (tmp_path / "xms").glob("1/wid=*")
    arguments = ["--dataset", str(pictures), "--results_dir", str(tmp_path / "results")]
    assert _evaluate(["--workdir", str(path), *arguments]) == 0
    (result,) = _results(tmp_path / "results")
    rates.append(result.mean("bpp_estimated"))
  assert rates[0] != rates[1]


def test_two_folders_of_one_name_keep_their_own_results(trained_run, tmp_path):
  for i, parent in enumerate(("a", "b")):
    (tmp_path / parent / "kodak").mkdir(parents=True)
    Image.fromarray(picture(20, 30, i)).save(tmp_path / parent / "kodak" / "1.png")
    arguments = ["--dataset", str(tmp_path / parent / "kodak")]
    arguments += ["--results_dir", str(tmp_path / "results")]
    assert _evaluate(["--workdir", str(trained_run.path), *arguments]) == 0
  found = _results(tmp_path / "results")
  assert len(found) == 2 and found[0].records[0].mse != found[1].records[0].mse
  assert not (tmp_path / "results" / "kodak").exists()


def test_the_best_checkpoint_can_be_named(trained_run):
  _, step = eval_lib.load_codec(trained_run, build, "best")
  assert step == checkpoints.Checkpoints(trained_run.checkpoints_dir).best()["step"]


def test_estimated_mode_makes_no_files(trained_run, pictures, tmp_path):
  argv = ["--workdir", str(trained_run.path), "--dataset", str(pictures), "--mode=estimated"]
  assert _evaluate([*argv, "--results_dir", str(tmp_path)]) == 0
  (result,) = _results(tmp_path)
  assert result.mode == "estimated"
  assert all(r.num_bytes is None and r.bpp == r.bpp_estimated for r in result.records)


@pytest.mark.parametrize(
  "change,expected",
  [
    ({"--dataset": "kodac"}, "Unknown dataset 'kodac'"),
    ({"--step": "5"}, "no checkpoint of step 5"),
    ({"--workdir": "nowhere"}, "No run directory"),
    ({"--mode": "guess"}, "bitstream"),
  ],
)
def test_bad_input_names_the_fix(trained_run, pictures, tmp_path, capsys, change, expected):
  arguments = {
    "--workdir": str(trained_run.path),
    "--dataset": str(pictures),
    "--results_dir": str(tmp_path),
    **change,
  }
  assert _evaluate([f"{k}={v}" for k, v in arguments.items()]) in (1, 2)
  assert expected in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_model_is_refused(trained_run, tmp_path):
  import shutil

  copied = tmp_path / trained_run.path.name
  shutil.copytree(trained_run.path, copied)
  record = json.loads((copied / "work_unit.json").read_text())
  model = record["work_unit"]["config"]["model_config"]
  model["analysis"]["num_filters"] = model["synthesis"]["num_filters"] = 7
  (copied / "work_unit.json").write_text(json.dumps(record))
  with pytest.raises(checkpoints.CheckpointError, match="does not fit"):
    eval_lib.load_codec(runs.RunDir.open(copied), build)


def test_a_decoder_that_gives_another_picture_is_never_averaged_over(trained_run, pictures):
  codec, _ = eval_lib.load_codec(trained_run, build)
  whole = codec.decompress
  codec.decompress = lambda data: 255 - whole(data)
  name, image = data.load_eval_images(str(pictures))[0]
  with pytest.raises(eval_lib.MismatchError, match="differs from the encoder's"):
    eval_lib.record(codec, name, image, "bitstream")


# --- Records kept while it is under way ---------------------------------------------------------

_KILLED = """
import os, signal, sys
from common import cli, eval_lib, results
from factorized import eval as entry
append, count = results.Partial.append, 0
def killed(self, record):
  global count
  append(self, record)
  count += 1
  if count == 3:
    with self.path.open("ab") as f:
      f.write(b'{"image": "torn')
    os.kill(os.getpid(), signal.SIGKILL)
results.Partial.append = killed
cli.eval_main("factorized", entry.run, sys.argv[1:])
"""


def _without_seconds(path):
  record = json.loads(path.read_text())
  for r in record["records"]:
    r["seconds_encode"] = r["seconds_decode"] = None
  return record


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on_and_ends_as_an_unbroken_one(
  evaluated, trained_run, odd_pictures, tmp_path, monkeypatch
):
  argv = ["--workdir", str(trained_run.path), "--dataset", str(odd_pictures)]
  argv += ["--results_dir", str(tmp_path)]
  done = subprocess.run([sys.executable, "-c", _KILLED, *argv], cwd=ROOT, capture_output=True)
  assert done.returncode == -9, done.stderr
  (partial,) = tmp_path.glob("*/*/*")
  assert partial.suffix == ".partial" and partial.read_bytes().endswith(b"torn")
  assert not results.find(tmp_path, partial.parent.parent.name)
  measured = []
  record = eval_lib.record
  monkeypatch.setattr(
    eval_lib, "record", lambda c, name, *a, **k: measured.append(name) or record(c, name, *a, **k)
  )
  assert _evaluate(argv) == 0
  assert measured == sorted(p.name for p in odd_pictures.iterdir())[3:]
  (path,) = tmp_path.glob("*/*/*")
  (unbroken,) = evaluated.glob("*/*/*.json")
  assert path.name == unbroken.name and _without_seconds(path) == _without_seconds(unbroken)


def _record(name="a.png", **more):
  return results.EvalRecord(
    **{
      **dict(image=name, num_pixels=4, num_bytes=3, bpp=6.0, bpp_estimated=0.1 + 0.2),
      **dict(psnr_db=None, msssim=None, msssim_scales=0, lpips=None, mse=1 / 3),
      **dict(seconds_encode=0.1, seconds_decode=None),
      **more,
    }
  )


def test_kept_records_are_those_that_were_measured_and_are_of_the_same_thing_only(tmp_path):
  path, of = tmp_path / "x" / "run.json", {"step": 1, "dataset": {"images": ("a.png", "b.png")}}
  with results.Partial(path, of) as partial:
    assert partial.records == {}
    partial.append(_record())
  with results.Partial(path, of) as partial:
    assert partial.records == {"a.png": _record()}
    partial.append(_record("b.png"))
  content = partial.path.read_bytes()
  # A kill within the last line.
  partial.path.write_bytes(content[:-9])
  with results.Partial(path, of) as partial:
    assert list(partial.records) == ["a.png"]
    partial.append(_record("b.png"))
  with results.Partial(path, of) as partial:
    assert list(partial.records.values()) == [_record(), _record("b.png")]
  for other, anew in (({**of, "step": 2}, False), (of, False), (of, True)):
    with results.Partial(path, other, anew) as partial:
      assert not partial.records
      partial.append(_record())
  with results.Partial(path, of) as partial:
    partial.remove()
  assert not list(path.parent.iterdir())


@pytest.mark.parametrize("content", [b"", b"\0\xff\n", b"[1]\n", b"{}\n{}\n", b'{"step": 1}'])
def test_a_partial_file_that_is_none_is_begun_anew(tmp_path, content):
  (tmp_path / "run.partial").write_bytes(content)
  with results.Partial(tmp_path / "run.json", {"step": 1}) as partial:
    assert not partial.records
    partial.append(_record())
  with results.Partial(tmp_path / "run.json", {"step": 1}) as partial:
    assert list(partial.records) == ["a.png"]


def test_two_processes_never_mix_and_the_second_names_the_first(tmp_path):
  import os

  path = tmp_path / "run.json"
  with results.Partial(path, {}) as first:
    first.append(_record())
    with pytest.raises(results.ResultError, match=f"made by process {os.getpid()} on"):
      results.Partial(path, {}, anew=True)
    first.append(_record("b.png"))
  with results.Partial(path, {}) as second:
    assert list(second.records) == ["a.png", "b.png"]


def test_results_that_cannot_be_written_are_an_error_before_anything_is_measured(
  trained_run, pictures, tmp_path, capsys, monkeypatch
):
  (tmp_path / "file").write_text("")
  monkeypatch.setattr(eval_lib, "record", lambda *a, **k: pytest.fail("was measured"))
  argv = ["--workdir", str(trained_run.path), "--dataset", str(pictures)]
  assert _evaluate([*argv, "--results_dir", str(tmp_path / "file")]) == 1
  assert "cannot be written" in capsys.readouterr().err
  with pytest.raises(results.ResultError, match="nothing was measured yet"):
    results.check_writable(tmp_path / "file" / "x.json")
  results.check_writable(tmp_path / "new" / "x.json")
  assert not list((tmp_path / "new").iterdir())


def test_a_disk_that_is_full_at_the_end_keeps_the_records(
  trained_run, pictures, tmp_path, capsys, monkeypatch
):
  argv = ["--workdir", str(trained_run.path), "--dataset", str(pictures)]
  argv += ["--results_dir", str(tmp_path)]

  def full(*args):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as m:
    m.setattr(runs, "write_json", full)
    assert _evaluate(argv) == 1
  error = capsys.readouterr().err
  assert "json cannot be written (No space left" in error and "--results_dir" in error
  monkeypatch.setattr(eval_lib, "record", lambda *a, **k: pytest.fail("was measured again"))
  assert _evaluate(argv) == 0


def test_a_disk_that_fills_up_keeps_what_was_measured(tmp_path, monkeypatch):
  with results.Partial(tmp_path / "run.json", {}) as partial:
    partial.append(_record())
    before = partial.path.read_bytes()
    file = partial._file

    class Full:
      def __getattr__(self, name):
        return getattr(file, name)

      def write(self, content):
        file.write(content[:5])
        raise OSError(28, "No space left on device")

    partial._file = Full()
    with pytest.raises(results.ResultError, match=r"No space left.*1 records are kept"):
      partial.append(_record("b.png"))
  assert partial.path.read_bytes() == before


def test_save_dir_and_skip_existing_false_measure_every_picture(
  trained_run, odd_pictures, tmp_path, monkeypatch
):
  argv = ["--workdir", str(trained_run.path), "--dataset", str(odd_pictures)]
  argv += ["--results_dir", str(tmp_path / "r")]
  append = results.Partial.append

  def stop(self, record):
    append(self, record)
    if len(self.records) == 2:
      raise OSError("stop")

  monkeypatch.setattr(results.Partial, "append", stop)
  assert _evaluate(argv) == 1
  monkeypatch.setattr(results.Partial, "append", append)
  (partial,) = (tmp_path / "r").glob("*/*/*.partial")
  assert partial.read_text().count('"image"') == 2
  assert _evaluate([*argv, "--save_dir", str(tmp_path / "saved")]) == 0
  assert len(list((tmp_path / "saved").glob("*.png"))) == 5
  assert [p.suffix for p in (tmp_path / "r").glob("*/*/*")] == [".json"]


@pytest.mark.slow
def test_save_pictures_puts_them_beside_the_results_and_does_nothing_twice(
  trained_run, odd_pictures, tmp_path
):
  argv = ["--workdir", str(trained_run.path), "--dataset", str(odd_pictures)]
  argv += ["--results_dir", str(tmp_path)]
  assert _evaluate(argv) == 0  # Without pictures.
  assert _evaluate([*argv, "--save_pictures"]) == 0
  (path,) = tmp_path.glob("*/bitstream/*.json")
  folder = results.pictures_dir(tmp_path, results.read(path))
  assert len(list(folder.glob("*.png"))) == len(list(folder.glob("*.ntc"))) == 5
  before = path.stat().st_mtime_ns
  assert _evaluate([*argv, "--save_pictures"]) == 0
  assert path.stat().st_mtime_ns == before
  next(folder.glob("*.png")).unlink()
  assert _evaluate([*argv, "--save_pictures"]) == 0
  assert len(list(folder.glob("*.png"))) == 5
  assert _evaluate([*argv, "--save_pictures", "--save_dir", str(tmp_path / "s")]) == 2


def test_save_pictures_goes_on_where_it_was(trained_run, odd_pictures, tmp_path, monkeypatch):
  argv = ["--workdir", str(trained_run.path), "--dataset", str(odd_pictures)]
  argv += ["--results_dir", str(tmp_path), "--save_pictures"]
  record, measured = eval_lib.record, []

  def interrupted(codec, name, *args, **more):
    measured.append(name)
    if len(measured) == 4:
      raise KeyboardInterrupt
    return record(codec, name, *args, **more)

  monkeypatch.setattr(eval_lib, "record", interrupted)
  assert _evaluate(argv) == 130
  (first, _, third) = sorted(tmp_path.rglob("*.png"))
  content = first.read_bytes()
  third.unlink()  # Then its record is none either.
  assert _evaluate(argv) == 0
  assert measured[4:] == measured[2:4] + sorted(p.name for p in odd_pictures.iterdir())[4:]
  assert len(list(tmp_path.rglob("*.png"))) == 5 and first.read_bytes() == content
  (path,) = tmp_path.rglob("*.json")
  assert len(results.read(path).records) == 5


# --- --profile -----------------------------------------------------------------------------------

_TINY = [
  a for a in tiny_arguments("unused", "unused") if "model_config" in a or a.endswith(".py:tiny")
]


def _config_of(name):
  return ["--config", str(ROOT / "factorized/configs" / name)]


@pytest.mark.slow
def test_profile_of_an_untrained_config_is_printed(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  argv = ["--profile", "--config", _TINY[0], *_TINY[1:], "--profile_size=40x56"]
  assert _evaluate(argv) == 0
  out = capsys.readouterr().out
  assert "untrained" in out and "not typical" in out and "40x56" in out
  assert {"f", "g", "compress", "decompress"} <= {w.split()[0] for w in out.splitlines() if w}
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_profile_of_a_run_alone_is_printed_only(trained_run, capsys, tmp_path):
  argv = ["--profile", "--workdir", str(trained_run.path), "--results_dir", str(tmp_path)]
  assert _evaluate([*argv, "--profile_size=40x56"]) == 0
  out = capsys.readouterr().out
  assert "step 6" in out and "not typical" not in out
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_profile_joins_the_results_and_stays_there(trained_run, odd_pictures, tmp_path):
  argv = ["--workdir", str(trained_run.path), "--dataset", str(odd_pictures)]
  argv += ["--results_dir", str(tmp_path)]
  assert _evaluate(argv) == 0
  (plain,) = _results(tmp_path)
  assert plain.profile is None
  # Into the file that there is: its records stay, to the last digit of their seconds.
  assert _evaluate([*argv, "--profile"]) == 0
  (result,) = _results(tmp_path)
  assert result.records == plain.records and result.dataset == plain.dataset
  # The picture in the middle, by pixels, of 1x1, 7x5, 17x33, 33x50, 33x50.
  assert result.profile["image"] == "2-17x33.png" and result.profile["size"] == [17, 33]
  record = next(r for r in result.records if r.image == "2-17x33.png")
  assert result.profile["num_bytes"] == record.num_bytes
  assert set(result.profile["stages"]) == {"f", "g"}
  # Evaluating anew measures the pictures again, and forgets no profile of the same model.
  assert _evaluate([*argv, "--skip_existing=false"]) == 0
  (again,) = _results(tmp_path)
  assert again.profile == result.profile and again.records != result.records
  # Asked for again, it is measured again.
  assert _evaluate([*argv, "--profile", "--profile_size=24x48"]) == 0
  (last,) = _results(tmp_path)
  assert last.profile["size"] == [24, 48] and last.records == again.records


@pytest.mark.slow
def test_profile_of_another_model_is_not_kept(pictures, tmp_path):
  import shutil

  for seed, more in ((5, ["--profile"]), (6, [])):
    shutil.rmtree(tmp_path / "xms", ignore_errors=True)
    argv = tiny_arguments(
      pictures, tmp_path / "xms", "--xid", "1", f"--config.train_eval_config.seed={seed}"
    )
    assert train(argv) == 0
    (path,) = (tmp_path / "xms").glob("1/wid=*")
    arguments = ["--dataset", str(pictures), "--results_dir", str(tmp_path / "results"), *more]
    assert _evaluate(["--workdir", str(path), *arguments]) == 0
    (result,) = _results(tmp_path / "results")
    assert (result.profile is None) == (not more)


@pytest.mark.parametrize(
  "argv,expected",
  [
    ([], "--workdir is needed"),
    (["--profile"], "--workdir is needed (or --config"),
    (["--workdir=x"], "--dataset is needed, or --profile"),
    (_config_of("bls2017.py"), "--config is for --profile"),
    (["--profile", *_config_of("bls2017.py"), "--workdir=x"], "goes without --config"),
    (["--profile", *_config_of("bls2017.py"), "--dataset=kodak"], "--workdir instead of --config"),
    (["--profile", *_config_of("bls2017.py"), "--step=3"], "--workdir instead of --config"),
    (["--profile", *_config_of("bls.py")], "there are: bls2017.py"),
    (["--profile", *_config_of("itinf.py")], "it lacks"),
    (
      ["--profile", *_config_of("bls2017.py"), "--config.model_config.analysis.name=A"],
      "Unknown transform 'A'",
    ),
    (["--profile", "--workdir=x", "--profile_size=768"], "--profile_size=512x768"),
    (["--profile", "--workdir=x", "--profile_size=0x768"], "--profile_size=512x768"),
    (["--workdir=x", "--dataset=kodak", "--profile_size=4x4"], "goes with --profile"),
    (["--profile", "--workdir=x", "--save_dir=y"], "--save_dir and --save_pictures need --dataset"),
  ],
)
def test_mistakes_about_profiles_name_the_fix(capsys, argv, expected):
  assert _evaluate(argv) == 2
  assert expected in capsys.readouterr().err


def test_sample_pictures_are_mirrored_to_any_size():
  _, whole = eval_lib.sample_image((512, 512))
  _, large = eval_lib.sample_image((700, 1300))
  assert large.shape == (700, 1300, 3) and large.dtype == np.uint8
  np.testing.assert_array_equal(large[:512, :512], whole)
  np.testing.assert_array_equal(large[:512, 512:1024], whole[:, ::-1])
  np.testing.assert_array_equal(large[512:, :512], whole[:323:-1])


def test_help_and_usage_errors_need_no_tensorflow():
  code = (
    "import sys, runpy; sys.argv[1:] = [{!r}]\n"
    "try: runpy.run_module('factorized.eval', run_name='__main__')\n"
    "except SystemExit as e: assert e.code == {}\n"
    "assert 'tensorflow' not in sys.modules"
  )
  for argument, exit_code in (("--help", 0), ("--profile", 2)):
    command = [sys.executable, "-c", code.format(argument, exit_code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--workdir" in done.stdout + done.stderr
