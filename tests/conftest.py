"""Fixtures that several tests share: small pictures, and one small trained run."""

import pathlib

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent


def picture(height, width, seed=0):
  """Smooth shapes with an edge and some grain: uint8 [height, width, 3]."""
  y, x = np.mgrid[:height, :width] / 16.0
  random = np.random.default_rng(seed)
  base = 120 + 60 * np.sin(x * (seed + 1) / 3 + 0.5 * y) + 40 * (x > 1)
  base = base + random.normal(0, 4, [height, width])
  return np.clip(np.stack([base, 0.8 * base + 20, 255 - base], -1), 0, 255).astype(np.uint8)


def tiny_arguments(pictures, experiments, *more, steps=6):
  """Arguments of a training that takes a second."""
  settings = {
    "train_data_config.dataset": str(pictures),
    "train_data_config.patchsize": 32,
    "train_data_config.batchsize": 2,
    "train_data_config.val_split": 0.4,
    "val_data_config.patchsize": 32,
    "val_data_config.batchsize": 2,
    "train_eval_config.num_steps": steps,
    "train_eval_config.checkpoint_every_steps": 2,
    "train_eval_config.eval_every_steps": 3,
    "train_eval_config.log_metrics_every_steps": 1,
    "model_config.analysis.num_filters": 6,
    "model_config.analysis.output_channels": 6,
    "model_config.synthesis.num_filters": 6,
    "model_config.synthesis.in_channels": 6,
  }
  overrides = [f"--config.{k}={v}" for k, v in settings.items()]
  config = str(ROOT / "factorized/configs/bls2017.py:tiny")
  return ["--config", config, "--experiments_dir", str(experiments), *overrides, *more]


def run_command(main, *arguments):
  """Calls an entry point's main in this process; returns its exit code."""
  with pytest.raises(SystemExit) as e:
    main(*arguments)
  return e.value.code


def train(argv):
  """`python -m factorized.train` in this process; returns the exit code."""
  from common import cli
  from factorized import train as entry

  return run_command(cli.main, "factorized", "train", entry.run, entry.check, argv)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
  """A folder of five pictures of 64x48."""
  folder = tmp_path_factory.mktemp("pictures")
  for i in range(5):
    Image.fromarray(picture(48, 64, i)).save(folder / f"{i}.png")
  return folder


@pytest.fixture(scope="session")
def odd_pictures(tmp_path_factory):
  """A folder of pictures whose sizes fit no grid."""
  folder = tmp_path_factory.mktemp("odd_pictures")
  for i, size in enumerate([(1, 1), (7, 5), (17, 33), (33, 50), (33, 50)]):
    Image.fromarray(picture(*size, i)).save(folder / f"{i}-{size[0]}x{size[1]}.png")
  return folder


@pytest.fixture(scope="session")
def trained_run(pictures, tmp_path_factory):
  """A run of 6 steps that nothing disturbed. Tests must not write to it."""
  from common import runs

  experiments = tmp_path_factory.mktemp("trained")
  assert train(tiny_arguments(pictures, experiments, "--xid", "1")) == 0
  (path,) = experiments.glob("1/wid=*")
  return runs.RunDir.open(path)
