"""Training of one run by several tasks of a real Slurm job; see tests/test_slurm_real.py."""

# ruff: noqa: F811
import os
import subprocess
import sys

import pytest

from common import launchers, runs
from tests.conftest import ROOT, tiny_arguments
from tests.test_slurm_real import cluster, is_waiting, slurm_says, start_now, wait_for  # noqa: F401
from tests.test_training import _assert_same_weights, _weights

pytestmark = pytest.mark.slow


def test_two_tasks_train_a_run_as_one_task_does(cluster, pictures, tmp_path):
  """One task of two replicas sums the same halves of each batch; the two tasks are interrupted."""
  env = {**os.environ, "NTC_NUM_THREADS": "1", "NTC_TRAIN_DIR": str(tmp_path / "xms")}
  steps = 300
  argv = tiny_arguments(pictures, tmp_path / "xms", steps=steps)
  argv += ["--config.train_data_config.batchsize=4"]
  argv += ["--config.train_eval_config.checkpoint_every_steps=20"]
  argv += ["--config.train_eval_config.eval_every_steps=100"]
  two = ["--config.train_eval_config.strategy=multi_worker", "--xid=two"]
  sargs = "--sargs=--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --hold"
  launch = [sys.executable, "launch.py", "--main=factorized.train", *argv, *two, sargs]
  done = subprocess.run(launch, cwd=ROOT, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  experiment = launchers.Experiment.open(tmp_path / "xms" / "two")
  job = experiment.jobs()[0]
  array = experiment.ids()[job.name].split("_")[0]
  slurm_says("scancel", f"{array}_[1-3]")  # One setting is enough.
  slurm_says("scontrol", "release", array)

  def said():
    return job.folder.log_file.read_text() if job.folder.log_file.exists() else "nothing"

  wait_for(lambda: list(job.folder.checkpoints_dir.glob("step-*")))
  assert "2 replicas of 2 workers" in said()
  slurm_says("scancel", "--signal=USR2", "--batch", f"{array}_0")
  wait_for(lambda: job.folder.read_state().get("requeues") == 1)
  stopped = job.folder.read_state()
  assert stopped["state"] == "REQUEUED" and 0 < stopped["step"] < steps, said()
  wait_for(lambda: is_waiting(array, 0))
  start_now(array, 0)

  one = ["--config.train_eval_config.strategy=mirrored", "--xid=one", "--wid=0"]
  one += ["--config.train_eval_config.num_replicas=2"]
  subprocess.run([sys.executable, "-m", "factorized.train", *argv, *one], cwd=ROOT, env=env,
                 check=True, capture_output=True)  # fmt: skip
  (whole,) = runs.find_runs(str(tmp_path / "xms" / "one" / "wid=0-*"))

  wait_for(lambda: job.folder.read_state()["state"] in ("DONE", "FAILED"))
  assert job.folder.read_state()["state"] == "DONE", said()
  assert f"Resumed at step {stopped['step']}" in said()
  assert job.folder.read_state()["attempt"] == 2
  _assert_same_weights(_weights(whole), _weights(job.folder))
