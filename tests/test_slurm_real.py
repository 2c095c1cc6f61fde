"""The Slurm executor on a real Slurm, which scripts/slurm_cluster.sh starts on this machine.

Where Slurm cannot be installed these tests are skipped, unless NTC_SLURM_TESTS=1: then they fail.
"""

# ruff: noqa: F811
import contextlib
import inspect
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from common import datasets, launchers, results, runs
from tests.conftest import ROOT, tiny_arguments
from tests.test_launch import command, project  # noqa: F401
from tests.test_slurm import listens, status, submit  # noqa: F401
from tests.test_sweeps import check_order, submit_sweep, sweep  # noqa: F401
from tests.test_training import _assert_same_weights, _weights

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "scripts" / "slurm_cluster.sh"


def wait_for(condition, seconds=180.0):
  """Fails with the condition's text and what Slurm says where `seconds` are not enough."""
  deadline = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > deadline:
      line = inspect.getsource(condition).strip()
      said = subprocess.run(["squeue", "-r", "-t", "all", "-o", "%i %P %T %r start=%S on=%N"],
                            capture_output=True, text=True)  # fmt: skip
      pytest.fail(f"Waited {seconds:.0f} s in vain for: {line}\n{said.stdout}{said.stderr}")
    time.sleep(0.2)


def free_ports(count):
  """The first of `count` ports in a row that nothing listens on."""
  for first in range(26817, 29000, count):
    with tempfile.TemporaryFile():
      sockets = [socket.socket() for _ in range(count)]
      try:
        for i, s in enumerate(sockets):
          s.bind(("127.0.0.1", first + i))
        return first
      except OSError:
        continue
      finally:
        for s in sockets:
          s.close()
  raise AssertionError("no free ports")


@contextlib.contextmanager
def started_cluster(**settings):
  """The folder of a running cluster; SLURM_CONF is set meanwhile."""
  must = os.environ.get("NTC_SLURM_TESTS") == "1"
  if not must and subprocess.run([SCRIPT, "installed"]).returncode:
    pytest.skip("Slurm is not installed, and only root can install it (apt-get)")
  folder = pathlib.Path(tempfile.mkdtemp(prefix="ntc-slurm-", dir="/tmp"))
  env = {**os.environ, "SLURM_CLUSTER_PORT": str(free_ports(4)), **settings}
  done = subprocess.run(
    [SCRIPT, "start", folder], env=env, capture_output=True, text=True, timeout=600
  )
  if done.returncode and not must:
    pytest.skip(f"Slurm does not start here: {done.stderr.strip()[-500:]}")
  assert done.returncode == 0, done.stderr
  patch = pytest.MonkeyPatch()
  patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
  patch.setenv("NTC_EXECUTOR", "slurm")
  for name in [n for n in os.environ if n.startswith(("SLURM_", "SBATCH_")) and n != "SLURM_CONF"]:
    patch.delenv(name)
  try:
    yield folder
  finally:
    subprocess.run([SCRIPT, "stop", folder], check=True, timeout=120)
    patch.undo()
  shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster():
  """One cluster for the module's tests."""
  with started_cluster() as folder:
    yield folder


@pytest.fixture
def on_slurm(cluster, monkeypatch):
  monkeypatch.setattr("configs.EXECUTOR", "slurm")


def slurm_says(*argv):
  return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def queue(xid):
  """Slurm's state of each task of an array, in order."""
  lines = slurm_says("squeue", "-h", "-r", "-t", "all", "-o", "%K %T", "-j", xid).split("\n")
  found = dict(line.split() for line in lines if line)
  return [found[index] for index in sorted(found, key=int)]


def is_waiting(xid, index):
  return queue(xid)[index] == "PENDING"


def start_now(xid, *indices):
  """After a requeue Slurm waits for two minutes; tests do not.

  Not in the very second of the requeue, either: a start then is of the revoked credential, which
  Slurm makes a FAILED of.
  """
  for index in indices:
    slurm_says("scontrol", "update", f"jobid={xid}_{index}", "StartTime=now+3")


def running(command, xid, *wids):
  states = [command.run(xid, wid).read_state() for wid in wids]
  return all(state["state"] == "RUNNING" and "pid" in state for state in states)


def test_time_limit_requeues_and_preemption_and_cancel_are_survived(
  command, on_slurm, tmp_path, listens
):
  waits = ["--config.mode=wait", f"--config.needs={tmp_path / 'go'}"]
  limit = "--sargs=--partition=low --time=1 --signal=B:USR2@50"
  limited = submit(command, limit, *waits, config=f"{command.config}:tiny")
  xid = submit(command, "--sargs=--time=20", *waits)
  wait_for(lambda: running(command, limited, 0, 1) and running(command, xid, 0, 1))

  # The limit comes by itself (Slurm looks every 30 s); the tasks are requeued, and go on later.
  wait_for(lambda: all(command.run(limited, w).read_state().get("requeues") == 1 for w in range(2)))
  wait_for(lambda: queue(limited) == ["PENDING"] * 2)
  assert status(command, limited) == ["REQUEUED"] * 2
  wait_for(lambda: running(command, xid, 0, 1, 2, 3))  # There is room now.

  # All of the nodes for a job of the partition `high`.
  first = [0, 1, 2, 3]
  slurm_says("sbatch", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null",
             "--wrap", "sleep 3")  # fmt: skip
  wait_for(lambda: all(is_waiting(xid, w) for w in first))
  for wid in first:
    state = command.run(xid, wid).read_state()
    assert (state["state"], state.get("requeues")) == ("REQUEUED", None)
    assert (command.run(xid, wid).path / "saved").exists()
  wait_for(lambda: slurm_says("squeue", "-h", "-p", "high") == "")
  start_now(xid, *first)
  wait_for(lambda: running(command, xid, *first))
  assert command.run(xid, first[0]).read_state()["attempt"] == 2

  assert command("cancel", xid) == 0
  wait_for(lambda: set(queue(xid)) == {"CANCELLED"})
  assert status(command, xid) == ["CANCELLED"] * 4
  (tmp_path / "go").touch()
  start_now(limited, 0, 1)
  wait_for(lambda: set(queue(limited)) == {"COMPLETED"})
  assert status(command, limited) == ["DONE"] * 2
  assert command.run(limited, 0).read_state()["attempt"] == 2


def test_failing_setting_is_rerun_alone_and_evaluations_follow(command, on_slurm, tmp_path):
  needed = tmp_path / "needed"
  xid = submit(command, f"--config.needs={needed}", "--then_eval=sample")

  def over():
    assert command("status", xid) == 0
    return "PENDING" not in command.out and "RUNNING" not in command.out

  wait_for(over)
  assert "1 CANCELLED, 6 DONE, 1 FAILED" in command.out
  assert "FileNotFoundError: needs" in command.out
  assert "Traceback" in command.run(xid, 1).read_state()["traceback"]
  needed.touch()
  assert command("rerun", xid) == 0
  assert "2 jobs" in command.out
  wait_for(over)
  assert "8 DONE" in command.out
  facts = [
    json.loads((command.run(xid, 1).path / name / "facts.json").read_text())["time"]
    for name in (".", "eval-sample")
  ]
  assert facts[0] < facts[1]


def test_runs_start_after_what_they_start_from(command, on_slurm, sweep, listens, tmp_path):
  """Of two families; the first is requeued once, which is no failure."""
  argv = ["--config.mode=wait", f"--config.needs={tmp_path / 'go'}", "--then_eval=sample"]
  xid = submit_sweep(command, sweep, *argv)
  first = command.run(xid, 0)
  wait_for(lambda: running(command, xid, 0))
  slurm_says("scancel", "--signal=USR2", "--batch", f"{xid}_0")
  wait_for(lambda: first.read_state().get("requeues") == 1)
  wait_for(lambda: is_waiting(xid, 0))
  assert command("status", xid) == 0
  assert command.out.count("waits for wid 0") == 3
  assert "which is" not in command.out.replace("which is REQUEUED", "")
  (tmp_path / "go").touch()
  start_now(xid, 0)

  def over():
    assert command("status", xid) == 0
    return "12 DONE" in command.out

  wait_for(over)
  assert first.read_state()["attempt"] == 2
  assert check_order(command, xid) == 4


def test_dependants_of_a_failed_run_are_rerun_with_it(command, on_slurm, sweep, tmp_path):
  needed = tmp_path / "needed"
  xid = submit_sweep(command, sweep, f"--config.needs={needed}", "--config.breaks=0")
  wait_for(lambda: queue(xid)[0] == "FAILED")
  shown = ["FAILED", *["PENDING"] * 4, "DONE"]
  wait_for(lambda: status(command, xid) == shown)
  assert command.out.count("waits for wid 0, which is FAILED") == 3
  needed.touch()
  assert command("rerun", xid) == 0, command.err + command.out
  assert "Submitted 5 jobs to Slurm in 3 arrays" in command.out
  wait_for(lambda: status(command, xid) == ["DONE"] * 6)
  assert check_order(command, xid) == 4
  ids = launchers.find_experiment(xid, command.experiments).submissions()
  old = {task.split("_")[0] for task in ids[1]["ids"].values()}
  wait_for(lambda: all(set(queue(array)) <= {"CANCELLED"} for array in old))  # By Slurm itself.


def test_each_task_has_a_gpu_of_its_own(command, on_slurm, tmp_path):
  if "gpu:2" not in slurm_says("sinfo", "-h", "-o", "%G"):
    assert os.environ.get("NTC_SLURM_TESTS") != "1", "mknod is refused"
    pytest.skip("pretended GPUs need mknod, which is not permitted here")
  needed = tmp_path / "go"
  argv = ["--sargs=--gres=gpu:1", "--config.mode=wait", f"--config.needs={needed}"]
  xid = submit(command, *argv)
  wait_for(lambda: running(command, xid, 0, 1, 2, 3))
  devices = set()
  for wid in range(4):
    run = command.run(xid, wid)
    device = json.loads((run.path / "facts.json").read_text())["env"]["CUDA_VISIBLE_DEVICES"]
    devices.add((run.read_state()["node"], device))
  assert devices == {("n1", "0"), ("n1", "1"), ("n2", "0"), ("n2", "1")}
  needed.touch()
  wait_for(lambda: set(queue(xid)) == {"COMPLETED"})
  assert status(command, xid) == ["DONE"] * 4


def test_1000_settings_are_one_array(command, on_slurm, project):
  file = project / "fake" / "configs" / "base.py"
  file.write_text(file.read_text().replace("[0, 1]", "range(500)"))
  xid = submit(command, "--sargs=--hold")
  assert "Submitted 1000 jobs to Slurm in 1 array" in command.out
  assert queue(xid) == ["PENDING"] * 1000
  assert command("status", xid) == 0
  assert "1000 PENDING" in command.out
  assert command("cancel", xid) == 0
  assert set(queue(xid)) == {"CANCELLED"}
  assert command("status", xid) == 0
  assert "1000 CANCELLED" in command.out


def test_slurm_checks_and_refuses_before_anything_is_written(command, on_slurm):
  assert command.launch("--test_only") == 0
  assert "to start at" in command.out
  for more in ([], ["--test_only"]):
    assert command.launch("--sargs=--partition=nowhere", *more) == 2
    assert "invalid partition" in command.err
  assert not command.experiments.exists()


def test_from_config_to_results_with_an_interrupted_task(cluster, pictures, tmp_path):
  environment = {
    **os.environ,
    "NTC_TRAIN_DIR": str(tmp_path / "train xms"),
    "NTC_RESULTS_DIR": str(tmp_path / "json results"),
  }
  config = tiny_arguments(pictures, tmp_path / "train xms", steps=60)
  argv = [sys.executable, "launch.py", "--main=factorized.train", *config]
  argv += ["--xid=sweep", f"--then_eval={pictures}"]
  done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  experiment = launchers.Experiment.open(tmp_path / "train xms" / "sweep")
  array = experiment.ids("slurm")[experiment.jobs()[0].name].split("_")[0]
  run = experiment.jobs()[1].folder
  wait_for(lambda: "num_steps" in run.read_state())
  slurm_says("scancel", "--signal=USR2", "--batch", f"{array}_1")
  wait_for(lambda: run.read_state().get("requeues") == 1)
  wait_for(lambda: is_waiting(array, 1))
  stopped = run.read_state()
  assert stopped["state"] == "REQUEUED"
  assert 0 < stopped["step"] < 60
  start_now(array, 1)

  unbroken = tiny_arguments(pictures, tmp_path / "whole", "--xid=1", "--wid=1", steps=60)
  env = {**environment, "NTC_NUM_THREADS": run.read_state()["num_threads"]}
  subprocess.run([sys.executable, "-m", "factorized.train", *unbroken], cwd=ROOT, env=env,
                 check=True, capture_output=True)  # fmt: skip

  wait_for(lambda: all(
    job.folder.read_state().get("state") in ("DONE", "FAILED") for job in experiment.jobs()
  ))  # fmt: skip
  argv = [sys.executable, "launch.py", "status", str(experiment.path)]
  said = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
  assert "8 DONE" in said, said
  assert run.read_state()["attempt"] == 2
  (whole,) = runs.find_runs(str(tmp_path / "whole" / "1" / "wid=1-*"))
  _assert_same_weights(_weights(whole), _weights(run))
  found = results.find(tmp_path / "json results", datasets.label(str(pictures)))
  assert len(found) == 4


@pytest.mark.skipif(
  os.environ.get("NTC_SLURM_ACCOUNTING") != "1",
  reason="installs MariaDB and takes minutes: NTC_SLURM_ACCOUNTING=1 asks for it",
)
def test_sacct_knows_what_squeue_has_forgotten(command, tmp_path, monkeypatch):
  with started_cluster(SLURM_CLUSTER_ACCOUNTING="1"):
    monkeypatch.setattr("configs.EXECUTOR", "slurm")
    waits = ["--config.mode=wait", f"--config.needs={tmp_path / 'go'}"]
    xid = submit(command, *waits)
    wait_for(lambda: running(command, xid, 0, 1, 2, 3))
    os.kill(command.run(xid, 0).read_state()["supervisor_pid"], signal.SIGKILL)
    slurm_says("scancel", f"{xid}_1")  # Behind the launcher's back.
    wait_for(lambda: command.run(xid, 1).read_state()["state"] == "REQUEUED")
    (tmp_path / "go").touch()
    wait_for(lambda: all(command.run(xid, w).read_state()["state"] == "DONE" for w in (2, 3)))
    wait_for(lambda: xid not in slurm_says("squeue", "-h", "-t", "all", "-o", "%F"), 300.0)
    assert status(command, xid) == ["FAILED", "CANCELLED", "DONE", "DONE"]
    assert "exit code 0:9" in command.out
    assert "left no end mark" in command.out
