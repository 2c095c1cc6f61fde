"""Fixtures that several tests share: small pictures, and one small trained run a family."""

import gc
import importlib
import os
import pathlib
import time

# Sweeps run on this machine unless a test asks for Slurm, even where Slurm is installed.
os.environ["NTC_EXECUTOR"] = "local"
os.environ.pop("NTC_NUM_THREADS", None)  # It cannot change within a process.
# Several workers share the cores: each computes with one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
  os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import hypothesis
import numpy as np
import pytest
from PIL import Image

# What imports and collection make stays: to look for garbage in it takes a third of their time, and
# some of each test's later on.
if "PYTEST_XDIST_WORKER" in os.environ:  # The process that hands them out collects nothing.
  gc.disable()

# A machine that is busy, or collects garbage, draws slowly: no defect of a test.
hypothesis.settings.register_profile(
  "project", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("project")

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Files whose tests must not run at the same time: they start a Slurm cluster on this machine.
_TOGETHER = {
  "test_slurm_real": "slurm",
  "test_slurm_chaos": "slurm",
  "test_slurm_training": "slurm",
}

# What takes minutes begins first, so that no worker is left alone with it.
_LONG = ("slurm", "test_tiling", "test_mshyper", "test_faults", "test_distribution")


@pytest.hookimpl(tryfirst=True)  # Before pytest-xdist reads the marks.
def pytest_collection_modifyitems(items):
  """A file's tests go to one worker, so that its fixtures are made once."""
  for item in items:
    item.add_marker(pytest.mark.xdist_group(_group(item)))
  items.sort(key=lambda item: _LONG.index(_group(item)) if _group(item) in _LONG else len(_LONG))


def _group(item):
  return _TOGETHER.get(item.path.stem, item.path.stem)


def pytest_collection_finish():
  """See above."""
  gc.freeze()
  gc.enable()


def picture(height, width, seed=0):
  """Smooth shapes with an edge and some grain: uint8 [height, width, 3]."""
  y, x = np.mgrid[:height, :width] / 16.0
  random = np.random.default_rng(seed)
  base = 120 + 60 * np.sin(x * (seed + 1) / 3 + 0.5 * y) + 40 * (x > 1)
  base = base + random.normal(0, 4, [height, width])
  return np.clip(np.stack([base, 0.8 * base + 20, 255 - base], -1), 0, 255).astype(np.uint8)


# Of the loop in `processor_slowness`, on a processor that tests' seconds are meant for.
_LOOP_SECONDS = 0.2


def processor_slowness():
  """How many times as long as there this processor takes now, 1 to 2."""
  began = time.process_time()
  sum(i * i for i in range(5_000_000))
  return min(2.0, max(1.0, (time.process_time() - began) / _LOOP_SECONDS))


# Family -> its config file, and the overrides that make its codec as small as can be.
TINY_MODELS = {
  "factorized": (
    "factorized/configs/bls2017.py:tiny",
    {
      "analysis.num_filters": 6,
      "analysis.output_channels": 6,
      "synthesis.num_filters": 6,
      "synthesis.in_channels": 6,
    },
  ),
  "mshyper": (
    "mshyper/configs/mbt2018.py:tiny",
    {
      "analysis.channels_base": 6,
      "analysis.output_channels": 6,
      "synthesis.channels_base": 6,
      "synthesis.in_channels": 6,
      "hyper_analysis.in_channels": 6,
      "hyper_analysis.bottleneck_size": 4,
      "hyper_synthesis.in_channels": 4,
      "hyper_synthesis.bottleneck_size": 6,
    },
  ),
}


def tiny_arguments(pictures, experiments, *more, steps=6, family="factorized"):
  """Arguments of a training that takes a second."""
  file, model = TINY_MODELS[family]
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
    **{f"model_config.{k}": v for k, v in model.items()},
  }
  overrides = [f"--config.{k}={v}" for k, v in settings.items()]
  return ["--config", str(ROOT / file), "--experiments_dir", str(experiments), *overrides, *more]


def run_command(main, *arguments):
  """Calls an entry point's main in this process; returns its exit code."""
  with pytest.raises(SystemExit) as e:
    main(*arguments)
  return e.value.code


def train(argv, family="factorized"):
  """`python -m <family>.train` in this process; returns the exit code."""
  return run_entry_point(family, "train", argv)


def run_entry_point(family, task, argv):
  """`python -m <family>.<task>`, train or itinf, in this process; returns the exit code."""
  from common import cli

  entry = importlib.import_module(f"{family}.{task}")
  return run_command(cli.main, family, task, entry.run, entry.check, argv)


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


@pytest.fixture(scope="session")
def trained_hyperprior_run(pictures, tmp_path_factory):
  """The same of the mean-scale hyperprior family."""
  from common import runs

  experiments = tmp_path_factory.mktemp("trained_hyperprior")
  argv = tiny_arguments(pictures, experiments, "--xid", "1", family="mshyper")
  assert train(argv, "mshyper") == 0
  (path,) = experiments.glob("1/wid=*")
  return runs.RunDir.open(path)
