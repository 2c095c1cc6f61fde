"""Iterative inference: less loss, in a real file of the same decoder, resumable."""

import numpy as np
import pytest
from PIL import Image

import configs
from common import cli, eval_lib, itinf_lib, results, runs
from factorized.codec import build
from tests.conftest import ROOT, run_command


def _itinf(argv):
  from factorized import itinf as entry

  return run_command(cli.main, "factorized", "itinf", entry.run, entry.check, argv)


def _arguments(trained, pictures, experiments, *more):
  settings = {
    "data_config.dataset": str(pictures),
    "data_config.batchsize": 3,
    "train_eval_config.num_steps": 60,
    "train_eval_config.warm_start_exp_dir": str(trained.path.parent),
    "train_eval_config.warm_start_wid": 0,
  }
  overrides = [f"--config.{k}={v}" for k, v in settings.items()]
  config = str(ROOT / "factorized/configs/itinf.py:tiny")
  return ["--config", config, "--experiments_dir", str(experiments), "--xid=1", *overrides, *more]


@pytest.fixture(scope="module")
def optimised(trained_run, odd_pictures, tmp_path_factory):
  folder = tmp_path_factory.mktemp("itinf")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(configs, "RESULTS_DIR", folder / "results")
    assert _itinf(_arguments(trained_run, odd_pictures, folder / "itinf_xms")) == 0
  (path,) = (folder / "itinf_xms").glob("1/wid=*")
  return folder, runs.RunDir.open(path)


def test_no_image_costs_more_than_with_the_encoder_alone_and_all_together_less(
  optimised, odd_pictures
):
  _, run = optimised
  gains = []
  for name in sorted(p.name for p in odd_pictures.iterdir()):
    facts = runs.read_json(run.path / "images" / name / "facts.json")
    gains.append(facts["loss_before"] - facts["loss_after"])
  assert min(gains) >= 0 and np.mean(gains) > 0


def test_the_results_are_those_of_files_that_the_trained_codec_decodes(
  optimised, trained_run, odd_pictures
):
  folder, run = optimised
  codec, _ = eval_lib.load_codec(trained_run, build)
  (path,) = (folder / "results").glob("*/itinf/*.json")
  result = results.read(path)
  assert result.mode == "itinf" and len(result.records) == 5
  for record in result.records:
    file = (run.path / "images" / record.image / "image.ntc").read_bytes()
    assert record.num_bytes == len(file)
    decoded = codec.decompress(file)
    reconstruction = Image.open(run.path / "images" / record.image / "reconstruction.png")
    np.testing.assert_array_equal(decoded, np.asarray(reconstruction))


def test_a_folder_an_image_with_the_latents_and_the_metrics(optimised):
  _, run = optimised
  folder = run.path / "images" / "2-17x33.png"
  assert np.load(folder / "latents.npz")["y"].shape == (1, 2, 3, 6)
  lines = runs.read_jsonl(folder / "metrics.jsonl")
  assert lines[0]["step"] == 0 and lines[-1]["step"] == 59
  assert {"bpp", "mse", "temperature"} <= set(lines[0])


def test_images_of_one_shape_share_a_trace(optimised, trained_run, odd_pictures, monkeypatch):
  """Pictures 3 and 4 have one shape: they go together; as alone, up to float rounding."""
  folder, _ = optimised
  traces = []
  compile_step = itinf_lib._LatentOptimizer._compile
  monkeypatch.setattr(
    itinf_lib._LatentOptimizer,
    "_compile",
    lambda self, *a: traces.append(1) or compile_step(self, *a),
  )
  monkeypatch.setattr(configs, "RESULTS_DIR", folder / "other_results")
  argv = _arguments(trained_run, odd_pictures, folder / "other", "--config.data_config.batchsize=1")
  assert _itinf(argv) == 0
  assert len(traces) == 4  # Four shapes, five images.


def test_a_restart_skips_finished_images(optimised, trained_run, odd_pictures, monkeypatch):
  folder, run = optimised
  monkeypatch.setattr(configs, "RESULTS_DIR", folder / "results")
  done = run.path / "images" / "0-1x1.png"
  unfinished = run.path / "images" / "1-7x5.png"
  before = (done / "image.ntc").stat().st_mtime_ns
  expected = (unfinished / "image.ntc").read_bytes()
  (unfinished / "record.json").unlink()
  run.write_state("REQUEUED")
  assert _itinf(["--workdir", str(run.path)]) == 0
  assert (done / "image.ntc").stat().st_mtime_ns == before
  assert (unfinished / "image.ntc").read_bytes() == expected  # Same seed, same latents.


def test_names_that_differ_only_in_blanks_keep_their_own_folders(tmp_path):
  run = runs.RunDir(tmp_path)
  names = ["a b.png", "a_b.png", "a/b.png", "a-b.png"]
  assert len({itinf_lib._folder(run, name) for name in names}) == 4


@pytest.mark.parametrize(
  "override,expected",
  [
    ("--config.train_eval_config.warm_start_exp_dir=", "Name the experiment"),
    ("--config.train_eval_config.warm_start_wid=3", "wid 3 does not name one"),
    ("--config.itinf_config.method=sgaa", "Known: mixedq, round, sga"),
    ("--config.data_config.dataset=kodac", "Unknown dataset"),
    ("--config.train_eval_config.log_metrics_every_steps=0", "log_metrics_every_steps"),
  ],
)
def test_bad_input_names_the_fix(trained_run, odd_pictures, tmp_path, capsys, override, expected):
  argv = _arguments(trained_run, odd_pictures, tmp_path / "x", override)
  assert _itinf(argv) == 2
  assert expected in capsys.readouterr().err
  assert not (tmp_path / "x").exists()
