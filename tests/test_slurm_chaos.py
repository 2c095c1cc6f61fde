"""Chaos on a real Slurm: killed trainers, supervisors and slurmds, a full disk; nothing is lost.

The seed of what is killed and when is printed; NTC_CHAOS_SEED=N repeats it.
"""

# ruff: noqa: F811
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from common import launchers, runs
from tests.conftest import ROOT, tiny_arguments
from tests.test_launch import Command
from tests.test_slurm_real import SCRIPT, cluster, on_slurm, slurm_says  # noqa: F401
from tests.test_training import _assert_same_weights, _weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS, SAVED_EVERY, EVALUATED_EVERY = 200, 10, 50
KILLS = ["task"] * 4 + ["supervisor"] * 3 + ["slurmd"] * 2
STUCK_SECONDS = 90.0

SWEEP = """
from common import hyper
from factorized.configs import bls2017

def get_config(variant=""):
  return bls2017.get_config("tiny")

def get_cfg_str(config):
  return hyper.name_from(config, ["model_config.rd_lambda", "train_eval_config.seed"])

def get_hyper(variant=""):
  by_rate = hyper.sweep("model_config.rd_lambda", [0.08, 0.02])
  return hyper.product(by_rate, hyper.sweep("train_eval_config.seed", range(4)))
"""


class SmallDisk:
  """A tmpfs in place of a run's directory, with room for about half of what the run writes."""

  def __init__(self, folder):
    self.folder = folder
    self.is_small = True
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    argv = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    done = subprocess.run(argv, capture_output=True, text=True)
    self.is_there = done.returncode == 0
    if self.is_there:
      for name, content in files.items():
        (folder / name).write_bytes(content)
      (folder / "ballast").write_bytes(bytes(2_000_000 - 350_000))

  def give_room(self):
    self.is_small = False
    subprocess.run(["mount", "-o", "remount,size=64m", self.folder], check=True)

  def remove(self):
    """The run's files stay; the tmpfs goes."""
    if self.is_there:
      copy = self.folder.with_name("copy")
      shutil.copytree(self.folder, copy)
      subprocess.run(["umount", "-l", self.folder], check=True)
      shutil.rmtree(self.folder)
      copy.rename(self.folder)


class Chaos:
  """A sweep, what is done to it, and what `status` says meanwhile."""

  def __init__(self, command, xid, cluster, seed):
    self.command, self.xid, self.cluster = command, xid, cluster
    self.random = random.Random(seed)
    self.step = self.random.randrange(STEPS)  # The next run that is killed has come that far.
    self.jobs = launchers.find_experiment(xid, command.experiments).jobs()
    self.killed = {job.wid: [] for job in self.jobs}  # Attempts and when they were killed.
    self.states = []
    self.hastened = {}
    self.story = []

  def note(self, text):
    self.story.append(f"{time.strftime('%H:%M:%S')} {text}")
    with self.command.capsys.disabled():
      print(self.story[-1], flush=True)

  def look(self):
    """One `status`: every run is there, in a state that can be."""
    assert self.command("status", self.xid) == 0, self.command.err
    rows = [line.split() for line in self.command.out.splitlines() if line.startswith("wid=")]
    assert [row[0] for row in rows] == [job.name for job in self.jobs]
    before, self.states = self.states, [row[1] for row in rows]
    if self.states != before:
      self.note(" ".join(self.states))
    assert set(self.states) <= set(runs.STATES)
    for job, state in zip(self.jobs, self.states):
      if state == "DONE":
        assert (job.folder.checkpoints_dir / f"step-{STEPS:08d}" / "manifest.json").exists()
      elif before:
        assert before[job.wid] != "DONE", f"{job.name} was DONE, and is {state}"
      for attempt, when in self.killed[job.wid]:
        if job.folder.read_state().get("attempt") == attempt:
          stuck = state == "RUNNING" and time.monotonic() - when > STUCK_SECONDS
          assert not stuck, f"{job.name} is shown RUNNING long after it was killed"

  def kill(self, what):
    """Kills one of `what`; returns whether there was one."""
    if what == "slurmd":
      node = self.random.choice("12")
      pid = int((self.cluster / "pids" / f"slurmd-{node}").read_text().split()[0])
      self.note(f"kill slurmd of n{node}")
      os.kill(pid, signal.SIGKILL)
      time.sleep(self.random.uniform(0.0, 2.0))
      subprocess.run([SCRIPT, "restart-node", self.cluster, f"n{node}"], check=True, timeout=90)
      return True
    found = []
    for job in self.jobs:
      state = job.folder.read_state()
      step = _newest_step(job.folder)
      if state.get("state") == "RUNNING" and step >= self.step and _is_at_work(job.folder, state):
        found.append((job, state, step))
    if not found:
      self.step = max(0, self.step - 2)
      return False
    self.step = self.random.randrange(STEPS)
    job, state, step = self.random.choice(found)
    pid = state["pid" if what == "task" else "supervisor_pid"]
    self.note(f"kill {what} of {job.name}, attempt {state['attempt']}, step {step}")
    os.kill(pid, signal.SIGKILL)
    self.killed[job.wid].append((state["attempt"], time.monotonic()))
    return True

  def hasten(self):
    """Slurm starts again after two minutes what a slurmd's death cost; tests do not wait."""
    for line in slurm_says("squeue", "-h", "-r", "-t", "PD", "-o", "%i %r").splitlines():
      task, reason = line.split(" ", 1)
      if reason == "BeginTime" and time.monotonic() - self.hastened.get(task, -60.0) > 30.0:
        self.note(f"{task} need not wait")
        self.hastened[task] = time.monotonic()
        slurm_says("scontrol", "update", f"jobid={task}", "StartTime=now+3")

  def task_of(self, wid):
    """The newest Slurm task of a run."""
    experiment = launchers.find_experiment(self.xid, self.command.experiments)
    return experiment.ids("slurm")[self.jobs[wid].name]

  def said_of(self, wid, task):
    """What a run's and Slurm's logs say of a task, and the run's record."""
    run = self.jobs[wid].folder
    logs = [run.log_file, run.path.parent / "logs" / f"{task}.txt"]
    text = "".join(path.read_text(errors="replace") for path in logs if path.exists())
    return text + str(run.read_state().get("reason"))

  def rerun(self):
    code = self.command("rerun", self.xid, "--sargs=")
    assert code in (0, 1), self.command.err
    said = [line for line in self.command.out.splitlines() if line.startswith("Submitted")]
    said += [line for line in self.command.out.splitlines() if "not over" in line]
    self.note(f"rerun: {code} {said} {self.command.err.strip()}")


def _newest_step(run):
  """The step that a run's metrics end with; 0 without any."""
  try:
    return json.loads(run.metrics_file.read_bytes().splitlines()[-1])["step"]
  except (OSError, IndexError, ValueError):
    return 0


def _is_at_work(run, state):
  """Whether the recorded processes are those of this run: no other process is ever killed."""
  try:
    commands = [pathlib.Path(f"/proc/{state[key]}/cmdline").read_bytes()
                for key in ("pid", "supervisor_pid")]  # fmt: skip
  except (KeyError, OSError):
    return False
  return str(run.path).encode() in commands[0] and b"common.slurm" in commands[1]


def records(folder):
  """Every JSON and JSONL record below a folder, by path; none is torn."""
  found = {}
  for path in folder.rglob("*.json*"):
    if path.suffix == ".json":
      found[path] = json.loads(path.read_text())
    elif path.suffix == ".jsonl":
      found[path] = [json.loads(line) for line in path.read_text().splitlines()]
  return found


UNBROKEN = """
import sys
from tests.conftest import train
for wid in sys.argv[1].split(","):
  assert train(["--xid=whole", f"--wid={wid}", *sys.argv[2:]]) == 0
"""


def train_unbroken(config, experiments, settings):
  """The same runs, one after the other in each of two processes; their folders in order."""
  argv = [f"--config={config}", f"--experiments_dir={experiments}", *settings]
  # As the jobs have it; tests.conftest drops NTC_NUM_THREADS.
  env = {**os.environ, "TF_NUM_INTRAOP_THREADS": "1"}
  commands = [[sys.executable, "-c", UNBROKEN, wids, *argv] for wids in ("0,2,4,6", "1,3,5,7")]
  started = [subprocess.Popen(c, cwd=ROOT, env=env, stderr=subprocess.PIPE) for c in commands]
  for process in started:
    said = process.communicate()[1]
    assert process.returncode == 0, said.decode()[-2000:]
  return runs.find_runs(f"{experiments}/whole/wid=*")


def test_nothing_is_lost_in_chaos(cluster, on_slurm, pictures, tmp_path, capsys):
  seed = int(os.environ.get("NTC_CHAOS_SEED") or time.time())
  file = tmp_path / "sweep.py"
  file.write_text(SWEEP)
  settings = [a for a in tiny_arguments(pictures, tmp_path, steps=STEPS) if "--config." in a]
  settings += [
    f"--config.train_eval_config.checkpoint_every_steps={SAVED_EVERY}",
    f"--config.train_eval_config.eval_every_steps={EVALUATED_EVERY}",
  ]
  command = Command(ROOT, tmp_path / "xms", capsys)
  launch = [*settings, "--deep_check=false"]
  # Held, until one of the runs has its small disk.
  argv = [*launch, "--sargs=--hold"]
  code = command.launch(*argv, main="factorized.train", config=str(file))
  assert code == 0, command.err
  xid = re.search(r"^Experiment (\d+):", command.out, re.MULTILINE).group(1)
  chaos = Chaos(command, xid, cluster, seed)
  chaos.note(f"NTC_CHAOS_SEED={seed}")
  kills = KILLS.copy()
  chaos.random.shuffle(kills)
  disk = SmallDisk(chaos.random.choice(chaos.jobs).folder.path)
  try:
    chaos.note(f"{disk.folder.name} has a small disk: {disk.is_there}")
    assert disk.is_there or os.environ.get("NTC_SLURM_TESTS") != "1", "mount -t tmpfs is refused"
    slurm_says("scontrol", "release", xid)
    failed_for_room = set()
    next_kill = 0.0
    deadline = time.monotonic() + 900.0
    while chaos.states != ["DONE"] * 8:
      assert time.monotonic() < deadline, "\n".join(chaos.story)
      chaos.look()
      small = chaos.jobs.index(next(j for j in chaos.jobs if j.folder.path == disk.folder))
      if kills and time.monotonic() > next_kill and chaos.kill(kills[-1]):
        kills.pop()
        next_kill = time.monotonic() + chaos.random.uniform(0.5, 4.0)
      chaos.hasten()
      if {"FAILED", "LOST", "TIMEOUT", "CANCELLED"} & set(chaos.states):
        if disk.is_there and disk.is_small and chaos.states[small] == "FAILED":
          task = chaos.task_of(small)
          if "No space left" in chaos.said_of(small, task):
            failed_for_room.add(task)
          if len(failed_for_room) == 2:
            disk.give_room()
            chaos.note("the small disk is given room")
        chaos.rerun()
      time.sleep(0.3)
  finally:
    disk.remove()
  if disk.is_there:
    assert len(failed_for_room) == 2
  assert not kills

  whole = train_unbroken(file, tmp_path / "whole", settings)
  experiment = launchers.find_experiment(xid, command.experiments)
  found = records(experiment.path)
  submitted = found[experiment.path / "submitted.jsonl"]
  for job, unbroken in zip(chaos.jobs, whole):
    assert job.name == unbroken.path.name
    _assert_same_weights(_weights(unbroken), _weights(job.folder))
    state = found[job.folder.state_file]
    assert (state["state"], state["step"], state["num_steps"]) == ("DONE", STEPS, STEPS)
    assert state["num_threads"] == "1"
    assert state["slurm_job"] == experiment.ids("slurm")[job.name]
    assert state["attempt"] > len(chaos.killed[job.wid])
    assert len(found[job.folder.environment_file]) <= state["attempt"]
    steps = {split: set() for split in ("train", "val")}
    for record in found[job.folder.metrics_file]:
      steps[record["split"]].add(record["step"])
    assert steps["train"] == set(range(1, STEPS + 1))
    assert steps["val"] == set(range(EVALUATED_EVERY, STEPS + 1, EVALUATED_EVERY))
    times = sum(job.name in record["ids"] for record in submitted)
    assert times >= 1 + len({attempt for attempt, _ in chaos.killed[job.wid]})
    if job.folder.path != disk.folder:
      started = re.findall(r"^\[supervise\] attempt (\d+)", job.folder.log_file.read_text(), re.M)
      assert [int(n) for n in started] == list(range(1, state["attempt"] + 1))
