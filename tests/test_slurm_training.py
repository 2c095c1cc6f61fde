"""Trainings under a real Slurm: a time limit, several tasks; see tests/test_slurm_real.py."""

# ruff: noqa: F811
import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from common import launchers, runs
from tests.conftest import ROOT, tiny_arguments
from tests.test_slurm_real import cluster, is_waiting, slurm_says, start_now, wait_for  # noqa: F401
from tests.test_training import _assert_same_weights, _weights

pytestmark = pytest.mark.slow


def submitted(argv, env, sargs):
  """Launches a sweep, held, and lets its first task start alone; returns its job and array."""
  launch = [
    sys.executable,
    "launch.py",
    "--main=factorized.train",
    *argv,
    f"--sargs={sargs} --hold",
  ]
  done = subprocess.run(launch, cwd=ROOT, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  (folder,) = pathlib.Path(env["NTC_TRAIN_DIR"]).glob("*/experiment.json")
  experiment = launchers.Experiment.open(folder.parent)
  job = experiment.jobs()[0]
  array = experiment.ids("slurm")[job.name].split("_")[0]
  slurm_says("scancel", f"{array}_[1-3]")  # One setting is enough.
  slurm_says("scontrol", "release", array)
  return job, array


def has_pending(pid, number):
  """Whether a signal waits for a process that is stopped."""
  with contextlib.suppress(OSError):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
      if line.startswith("ShdPnd:"):
        return bool(int(line.split()[1], 16) & 1 << (number - 1))
  return True  # It is gone.


def test_a_time_limit_costs_no_bit_of_the_weights(cluster, pictures, tmp_path):
  """The trainer is held in the middle of its work until the limit's own signal has come."""
  env = {**os.environ, "NTC_NUM_THREADS": "1", "NTC_TRAIN_DIR": str(tmp_path / "xms")}
  steps = 1500
  argv = tiny_arguments(pictures, tmp_path / "xms", steps=steps)
  argv += ["--config.train_eval_config.checkpoint_every_steps=100"]
  argv += ["--config.train_eval_config.eval_every_steps=500"]
  job, array = submitted(argv, env, "--time=1 --signal=B:USR2@50")

  def state():
    return job.folder.read_state()

  wait_for(lambda: list(job.folder.checkpoints_dir.glob("step-*")) or state().get("requeues"))
  if not state().get("requeues"):
    pid = state()["pid"]
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: has_pending(pid, signal.SIGUSR2))
    os.kill(pid, signal.SIGCONT)
  wait_for(lambda: state().get("requeues"))
  assert state()["state"] == "REQUEUED" and state()["step"] < steps
  wait_for(lambda: is_waiting(array, 0))
  slurm_says("scontrol", "update", f"jobid={array}_0", "TimeLimit=20")
  start_now(array, 0)

  whole = unbroken(argv, env, "--wid=0")
  wait_for(lambda: state()["state"] in ("DONE", "FAILED"))
  assert state()["state"] == "DONE" and state()["attempt"] == 2
  _assert_same_weights(_weights(whole), _weights(job.folder))


def unbroken(argv, env, *more):
  """A run of the same settings that nothing disturbs."""
  command = [sys.executable, "-m", "factorized.train", *argv, "--xid=whole", *more]
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  (whole,) = runs.find_runs(env["NTC_TRAIN_DIR"] + "/whole/wid=0-*")
  return whole


def test_two_tasks_train_a_run_as_one_task_does(cluster, pictures, tmp_path):
  """One task of two replicas sums the same halves of each batch; the two tasks are interrupted."""
  env = {**os.environ, "NTC_NUM_THREADS": "1", "NTC_TRAIN_DIR": str(tmp_path / "xms")}
  steps = 300
  argv = tiny_arguments(pictures, tmp_path / "xms", steps=steps)
  argv += ["--config.train_data_config.batchsize=4"]
  argv += ["--config.train_eval_config.checkpoint_every_steps=20"]
  argv += ["--config.train_eval_config.eval_every_steps=100"]
  two = "--config.train_eval_config.strategy=multi_worker"
  sargs = "--nodes=2 --ntasks-per-node=1 --cpus-per-task=1"
  job, array = submitted([*argv, two], env, sargs)

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

  one = "--config.train_eval_config.strategy=mirrored"
  whole = unbroken(argv, env, one, "--config.train_eval_config.num_replicas=2", "--wid=0")
  wait_for(lambda: job.folder.read_state()["state"] in ("DONE", "FAILED"))
  assert job.folder.read_state()["state"] == "DONE", said()
  assert f"Resumed at step {stopped['step']}" in said()
  assert job.folder.read_state()["attempt"] == 2
  _assert_same_weights(_weights(whole), _weights(job.folder))


def test_workers_of_a_preempted_and_of_a_cancelled_run_save_their_state(
  cluster, pictures, tmp_path
):
  env = {**os.environ, "NTC_NUM_THREADS": "1", "NTC_TRAIN_DIR": str(tmp_path / "xms")}
  argv = tiny_arguments(pictures, tmp_path / "xms", steps=100_000)
  argv += ["--config.train_data_config.batchsize=4"]
  argv += ["--config.train_eval_config.strategy=multi_worker"]
  argv += ["--config.train_eval_config.eval_every_steps=100000"]
  argv += ["--config.train_eval_config.checkpoint_every_steps=100000"]
  job, array = submitted(argv, env, "--partition=low --nodes=2 --ntasks-per-node=1")

  def state():
    return job.folder.read_state()

  def has_saved():
    return (job.folder.checkpoints_dir / f"step-{state()['step']:08d}").is_dir()

  wait_for(lambda: state().get("step"))
  slurm_says("sbatch", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
  wait_for(lambda: is_waiting(array, 0))
  preempted = state()
  assert (preempted["state"], preempted["exit_code"]) == ("REQUEUED", 75)
  assert has_saved()
  wait_for(lambda: slurm_says("squeue", "-h", "-p", "high") == "")
  start_now(array, 0)
  wait_for(lambda: state()["step"] > preempted["step"])

  cancel = [sys.executable, "launch.py", "cancel", str(job.folder.path.parent)]
  subprocess.run(cancel, cwd=ROOT, env=env, check=True)
  wait_for(lambda: state()["state"] == "CANCELLED")
  assert (state()["attempt"], state()["exit_code"]) == (2, 75)
  assert state()["step"] > preempted["step"] and has_saved()
