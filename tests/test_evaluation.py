"""Evaluation: real bytes, records of each image, files that say where they come from."""

import json

import numpy as np
import pytest
from PIL import Image

from common import checkpoints, cli, data, eval_lib, results, runs
from factorized.codec import build
from tests.conftest import picture, run_command, tiny_arguments, train


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
