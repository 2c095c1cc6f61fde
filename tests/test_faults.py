"""What can go wrong around a training: each fault costs time at most, never a result.

Two processes on one run, a loss that is not finite, one lost checkpoint: test_training.py.
Supervisors, Slurm and its nodes: test_supervise.py, test_slurm_chaos.py.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from common import checkpoints, cli, eval_lib, runs
from factorized import eval as factorized_eval
from tests.conftest import ROOT, run_command, tiny_arguments, train
from tests.test_training import _assert_same_weights, _only_run, _start, _weights

KILLS = 20


class _Killer:
  """Kills a training at its next step, while it saves, or before its first step."""

  def __init__(self, experiments, seed):
    self.experiments, self.random = experiments, random.Random(seed)
    self.kinds = ["step"] * 12 + ["saving"] * 5 + ["start"] * 3
    self.random.shuffle(self.kinds)
    self.done = []

  def _steps(self):
    files = list(self.experiments.glob("1/wid=*/metrics.jsonl"))
    return sum(line.count(b"\n") for f in files for line in [f.read_bytes()])

  def _is_saving(self):
    return any(self.experiments.glob("1/wid=*/checkpoints/.saving-*"))

  def attend(self, process):
    """Returns when the process is gone; kills it if there is a kill left."""
    if not self.kinds:
      return process.wait(300)
    kind = self.kinds[-1]
    if kind == "start":
      time.sleep(self.random.uniform(0.05, 2.0))
    else:
      before, more = self._steps(), self.random.randrange(1, 25)
      is_due = self._is_saving if kind == "saving" else lambda: self._steps() >= before + more
      while process.poll() is None and self._steps() == before:
        time.sleep(0.005)
      while process.poll() is None and not is_due():
        time.sleep(0.0005)
      if kind == "step":
        time.sleep(self.random.uniform(0, 0.02))
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
      self.done.append(self.kinds.pop())
    return process.wait(300)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_weights_of_an_unbroken_run(pictures, tmp_path):
  seed = int(os.environ.get("NTC_FAULTS_SEED", random.randrange(1 << 30)))
  print(f"NTC_FAULTS_SEED={seed}")
  eager = {"checkpoint_every_steps": 7, "eval_every_steps": 25, "log_images_every_evals": 0}
  more = [f"--config.train_eval_config.{k}={v}" for k, v in eager.items()]
  argv = tiny_arguments(pictures, tmp_path / "killed", "--xid", "1", *more, steps=600)
  killer = _Killer(tmp_path / "killed", seed)
  for _ in range(3 * KILLS):
    process = _start(argv)
    code = killer.attend(process)
    if code == 0:
      break
    assert code == -signal.SIGKILL, process.stdout.read()
  assert len(killer.done) == KILLS, f"It ended after {len(killer.done)} kills."
  run = _only_run(tmp_path / "killed")
  assert run.read_state()["state"] == "DONE"
  argv = tiny_arguments(pictures, tmp_path / "whole", "--xid", "1", *more, steps=600)
  process = _start(argv)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  whole = _only_run(tmp_path / "whole")
  _assert_same_weights(_weights(whole), _weights(run))
  assert checkpoints.Checkpoints(run.checkpoints_dir).best() == (
    checkpoints.Checkpoints(whole.checkpoints_dir).best()
  )
  # Every step's last record is the unbroken run's.
  last = [
    {(r["split"], r["step"]): (r["loss"], r["bpp"]) for r in runs.read_jsonl(x.metrics_file)}
    for x in (run, whole)
  ]
  assert last[0] == last[1] and len(last[0]) == 600 + 24


def _before_step(monkeypatch, number, action):
  """Does something before the training's step `number`, counted from 0."""
  from common import train_lib

  made = train_lib.make_train_step

  def make(*args):
    step_of = made(*args)

    def step(crops, at, *rest):
      if at == number:
        action()
      return step_of(crops, at, *rest)

    return step

  monkeypatch.setattr(train_lib, "make_train_step", make)


@pytest.fixture
def small_disk(tmp_path):
  """A tmpfs of 2 MB, and a function that mounts it again with other options."""
  folder = tmp_path / "disk"
  folder.mkdir()
  argv = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
  done = subprocess.run(argv, capture_output=True, text=True)
  if done.returncode != 0:
    assert os.environ.get("NTC_SLURM_TESTS") != "1", "mount -t tmpfs is refused"
    pytest.skip(f"a small disk cannot be made here: {done.stderr.strip()}")
  yield folder, lambda o: subprocess.run(["mount", "-o", f"remount,{o}", str(folder)], check=True)
  subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_the_newest_checkpoint_and_a_rerun_ends_as_if_it_never_was(
  small_disk, pictures, trained_run, monkeypatch, capsys
):
  folder, remount = small_disk
  argv = tiny_arguments(pictures, folder, "--xid", "1")

  def fill():
    with (folder / "ballast").open("wb", buffering=0) as f, contextlib.suppress(OSError):
      while True:
        f.write(bytes(4096))
    os.truncate(folder / "ballast", (folder / "ballast").stat().st_size - 30_000)

  with monkeypatch.context() as m:
    _before_step(m, 3, fill)
    assert train(argv) == 1
  run = _only_run(folder)
  ckpts = checkpoints.Checkpoints(run.checkpoints_dir)
  assert ckpts.steps() == [2, 3] and ckpts.latest() == 3  # Of a checkpoint's 60 kB half fits.
  assert not list(run.checkpoints_dir.glob(".saving-*"))
  error = capsys.readouterr().err
  assert "No space left" in error and str(run.checkpoints_dir) in error
  assert "Traceback" not in error and f"--workdir '{run.path}'" in error
  (folder / "ballast").unlink()
  remount("size=64m")
  assert train(["--workdir", str(run.path)]) == 0
  assert run.read_state()["state"] == "DONE"
  _assert_same_weights(_weights(trained_run), _weights(run))


def test_a_read_only_results_folder_is_named_before_hours_of_work(
  small_disk, trained_run, pictures, monkeypatch, capsys
):
  folder, remount = small_disk
  monkeypatch.setattr(eval_lib, "record", lambda *a, **k: pytest.fail("was measured"))
  remount("ro")
  argv = ["--workdir", str(trained_run.path), "--dataset", str(pictures)]
  argv += ["--results_dir", str(folder / "results")]
  assert run_command(cli.eval_main, "factorized", factorized_eval.run, argv) == 1
  error = capsys.readouterr().err
  assert "Read-only file system" in error and str(folder) in error and "Traceback" not in error
  monkeypatch.undo()
  remount("rw")
  assert run_command(cli.eval_main, "factorized", factorized_eval.run, argv) == 0
  assert len(list((folder / "results").glob("*/bitstream/*.json"))) == 1


@pytest.mark.slow
def test_a_data_set_that_vanishes_stops_the_run_which_goes_on_when_it_is_back(
  pictures, tmp_path, monkeypatch, capsys
):
  """Nothing is cached; the folder is away from step 4 on."""
  shutil.copytree(pictures, tmp_path / "photos")
  more = ["--config.train_data_config.cache_mb=0", "--config.train_data_config.val_split=None"]
  argv = [*tiny_arguments(tmp_path / "photos", tmp_path / "runs", "--xid", "1", *more, steps=60)]
  with monkeypatch.context() as m:
    _before_step(m, 4, lambda: (tmp_path / "photos").rename(tmp_path / "away"))
    assert train(argv) == 1
  assert "No picture of 'photos" in capsys.readouterr().err
  run = _only_run(tmp_path / "runs")
  assert run.read_state()["state"] == "FAILED"
  saved = checkpoints.Checkpoints(run.checkpoints_dir).latest()
  assert 4 <= saved < 60
  assert train(["--workdir", str(run.path)]) == 2  # Still away.
  assert "photos" in capsys.readouterr().err
  (tmp_path / "away").rename(tmp_path / "photos")
  assert train(["--workdir", str(run.path)]) == 0
  argv[argv.index("--xid") + 1] = "2"
  assert train(argv) == 0
  (whole,) = (tmp_path / "runs" / "2").glob("wid=*")
  _assert_same_weights(_weights(runs.RunDir(whole)), _weights(run))


@pytest.mark.slow
def test_jumps_of_the_clock_change_nothing(pictures, trained_run, tmp_path, monkeypatch):
  real, jumps = time.time, random.Random(0)
  monkeypatch.setattr(time, "time", lambda: real() + jumps.choice([-1e8, -3600.0, 0.0, 3600.0]))
  assert train(tiny_arguments(pictures, tmp_path, "--xid", "1")) == 0
  run = _only_run(tmp_path)
  assert run.read_state()["state"] == "DONE"
  _assert_same_weights(_weights(trained_run), _weights(run))
  steps = [r["step"] for r in runs.read_jsonl(run.metrics_file) if r["split"] == "train"]
  assert steps == [1, 2, 3, 4, 5, 6]


def _newer(run):
  record = json.loads(run.work_unit_file.read_text())
  record["schema_version"] = runs.SCHEMA_VERSION + 1
  record["work_unit"]["config"]["train_eval_config"]["of_the_future"] = True
  run.work_unit_file.write_text(json.dumps(record))


def test_a_run_of_a_newer_schema_is_left_alone_by_every_command(trained_run, pictures, tmp_path):
  copied = tmp_path / "1" / trained_run.path.name
  shutil.copytree(trained_run.path, copied)
  run = runs.RunDir(copied)
  _newer(run)
  before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
  commands = [
    ["-m", "factorized.train", "--workdir", copied],
    ["-m", "factorized.eval", "--workdir", copied, "--dataset", pictures, "--results_dir", "r"],
    ["ntc.py", "compress", pictures / "0.png", tmp_path / "out.ntc", "--workdir", copied],
    ["launch_eval.py", "--workdirs", copied, "--dataset", pictures],
  ]
  for argv in commands:
    done = subprocess.run(
      [sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, (argv, done.stderr)
    assert f"schema version {runs.SCHEMA_VERSION + 1}" in done.stderr + done.stdout
    assert "Use the code that wrote it" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
  assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before
