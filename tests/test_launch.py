"""Launching, with a family that needs no TensorFlow: sweep to records, failures, stops, reruns."""

import errno
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib

import pytest

import configs
import launch
import launch_eval
from common import hyper, launchers, runs, supervise
from tests.conftest import processor_slowness

ROOT = pathlib.Path(__file__).resolve().parent.parent

CONFIG = """
import ml_collections
from common import hyper

def get_config(variant=""):
  hyper.check_variant(variant, ["tiny"])
  config = ml_collections.ConfigDict()
  config.num_steps = 2 if variant else 4
  config.seed = 0
  config.model_config = ml_collections.ConfigDict({"rd_lambda": 0.01, "name": "a"})
  config.mode = "done"
  config.needs = ""
  return config

def get_cfg_str(config):
  return hyper.name_from(config, ["model_config.rd_lambda", "seed"])

def get_hyper(variant=""):
  rd_lambdas = [0.08] if variant else [0.08, 0.01]
  by_lambda = hyper.sweep("model_config.rd_lambda", rd_lambdas)
  return hyper.product(by_lambda, hyper.sweep("seed", [0, 1]))
"""

TRAIN = """
import json, os, pathlib, signal, sys, time
from common import runs

if sys.argv[1].startswith("--check_units="):
  print("checked")
  for record in json.loads(pathlib.Path(sys.argv[1].split("=", 1)[1]).read_text()):
    config = record["config"]
    if config["mode"] == "bad" and config["seed"] == 1:
      print("TensorFlow has much to say")
      sys.stderr.write("noise\\nError: wid %d: mode 'bad' is none\\n" % record["wid"])
      sys.exit(2)
    if config["mode"] == "crash":
      raise KeyError("no such thing")
  sys.exit(0)
run = runs.RunDir.open(sys.argv[sys.argv.index("--workdir") + 1])
unit = run.read_work_unit()
config = unit.config
stop = []
signal.signal(signal.SIGTERM, lambda n, f: stop.append(n))
with run.locked():
  run.write_environment()
  facts = {"argv": sys.argv[1:], "cwd": os.getcwd(), "file": __file__, "time": time.time()}
  facts["env"] = {k: v for k, v in os.environ.items() if k.startswith(("NTC_", "CUDA_V"))}
  runs.write_json(run.path / "facts.json", facts)
  saved = run.path / "saved"
  step = int(saved.read_text()) if saved.exists() else 0
  mode = config["mode"]
  if mode == "done" and config["needs"] and unit.wid == 1 and not os.path.exists(config["needs"]):
    raise FileNotFoundError(f"needs {config['needs']}")
  while step < config["num_steps"]:
    step += 1
    run.write_state("RUNNING", step=step, num_steps=config["num_steps"], pid=os.getpid())
    time.sleep(0.01)
    while mode == "wait" and not stop and not os.path.exists(config["needs"]):
      time.sleep(0.01)
    if stop:
      saved.write_text(str(step))
      sys.exit(runs.EXIT_RESUME)
  if mode == "no mark":
    sys.exit(0)
  run.write_state("DONE", step=step)
"""

EVAL = """
import os, pathlib, sys, time
from common import runs

if sys.argv[1] == "--check_args":
  sys.exit(0)
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
job = runs.RunDir(pathlib.Path(given["--job_dir"]))
run = runs.RunDir.open(given["--workdir"])
if run.read_state()["state"] != "DONE":
  raise SystemExit("no checkpoint")
facts = {"argv": sys.argv[1:], "cwd": os.getcwd(), "time": time.time()}
facts["env"] = {k: v for k, v in os.environ.items() if k.startswith("NTC_")}
runs.write_json(job.path / "facts.json", facts)
job.write_state("DONE", step=24, num_steps=24)
"""


@pytest.fixture
def project(tmp_path):
  """A project of the real launcher and one fake family; its path has a blank and a quote."""
  root = tmp_path / "it's a project"
  (root / "fake" / "configs").mkdir(parents=True)
  shutil.copytree(ROOT / "common", root / "common", ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("configs.py", "launch.py", "launch_eval.py", "slurm_template.py"):
    shutil.copy2(ROOT / name, root / name)
  (root / "fake" / "__init__.py").touch()
  (root / "fake" / "train.py").write_text(TRAIN)
  (root / "fake" / "eval.py").write_text(EVAL)
  (root / "fake" / "configs" / "base.py").write_text(CONFIG)
  return root


class Command:
  """Calls launch.main within this process, for one project and experiments folder."""

  def __init__(self, project, experiments, capsys):
    self.project, self.experiments, self.capsys = project, experiments, capsys
    self.config = str(project / "fake" / "configs" / "base.py")
    self.out = self.err = ""

  def __call__(self, *argv):
    code = launch.main([*argv, f"--experiments_dir={self.experiments}"], self.project)
    self.out, self.err = self.capsys.readouterr()
    return code

  def launch(self, *argv, main="fake.train", config=None):
    return self("--main", main, "--config", config or self.config, *argv)

  def launch_two(self, *argv):
    return self.launch("--jobs=2", *argv, config=f"{self.config}:tiny")

  def states(self, xid):
    experiment = launchers.find_experiment(xid, self.experiments)
    return [launchers.observe(job.folder)["state"] for job in experiment.jobs()]

  def run(self, xid, wid):
    return next(runs.RunDir.open(p) for p in (self.experiments / xid).glob(f"wid={wid}-*"))


@pytest.fixture
def command(project, tmp_path, capsys):
  return Command(project, tmp_path / 'experiments "here"', capsys)


def tree(folder):
  return {p for p in folder.rglob("*") if "__pycache__" not in p.parts}


def wait_for(condition, seconds=15.0):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "waited in vain"
    time.sleep(0.02)


def runs_within(seconds, argv, cwd):
  """A command's output; it has a few attempts, and on a busy machine its processor time counts, of
  a slower processor as much less."""
  took = []
  while not took or (min(took) >= seconds and len(took) < 6):
    slowness = processor_slowness() if took else 1.0
    begin, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=True)
    took.append(time.perf_counter() - begin)
    if os.getloadavg()[0] > launchers.num_cpus():
      now = resource.getrusage(resource.RUSAGE_CHILDREN)
      took[-1] = now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime
      took[-1] /= min(slowness, processor_slowness())
  assert min(took) < seconds
  return done.stdout


# Before anything is written


def test_dry_run_shows_the_settings_and_writes_nothing(command, project, tmp_path):
  before = tree(tmp_path)
  assert command.launch("--dry_run", "--config.num_steps=9") == 0
  assert tree(tmp_path) == before
  assert "rd_lambda=0.01-seed=1" in command.out
  assert "num_steps=9" in command.out
  assert "4 settings" in command.out
  assert command.launch("--dry_run", "--config.mode=bad") == 0  # No other process is started.
  assert "values are checked at launch" in command.out.splitlines()[-1]


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    (["--config.model_config.rd_lamda=1"], ["rd_lamda", "rd_lambda", "name"]),
    (["--config.num_steps=many"], ["num_steps", "whole number"]),
    (["--config.seed=3"], ["swept"]),
    (["--man=x"], ["--main", "man"]),
    (["--jobs=0"], ["--jobs=0"]),
    (["--executor=pbs"], ["pbs", "slurm", "local"]),
    (["--xid=a/b"], ["a/b"]),
    (["--args=--workdir x"], ["--workdir"]),
    (["--args=--config.num_steps=3"], ["--config.num_steps=3"]),
    (["--args=it's"], ["quotation"]),
    (["--args=--experiments_dir elsewhere"], ["elsewhere"]),
    (["stray"], ["stray"]),
    (["--then_eval=kodac"], ["kodac", "kodak"]),
    (["--config.mode=bad"], ["wid 1: mode 'bad' is none"]),
    (["--config.mode=crash"], ["fake.train", "no such thing"]),
  ],
)
def test_mistakes_are_one_line_and_come_before_any_side_effect(command, tmp_path, argv, says):
  before = tree(tmp_path)
  assert command.launch(*argv) == 2
  assert tree(tmp_path) == before
  assert command.err.startswith("Error: ")
  assert command.err.count("\n") == 1
  for part in says:
    assert part in command.err


def test_unknown_main_and_missing_config_name_the_known_ones(command):
  assert command.launch(main="fake.trian") == 2
  assert "fake.train" in command.err
  assert command.launch(main="fake.eval") == 2
  assert "launch_eval.py" in command.err
  assert command.launch(config=command.config.replace("base", "bse")) == 2
  assert "base.py" in command.err
  assert command("--main", "fake.train") == 2
  assert "--config" in command.err


def test_typo_in_the_sweep_stops_the_launch(command, project, tmp_path):
  file = project / "fake" / "configs" / "base.py"
  file.write_text(CONFIG.replace('sweep("seed"', 'sweep("sed"'))
  assert command.launch() == 2
  assert "Unknown config key 'sed'" in command.err
  assert "seed" in command.err
  assert not command.experiments.exists()


@pytest.mark.parametrize(
  ("old", "new", "says"),
  [("[0, 1]", "[1, 1]", "are the same"), ('"seed"])', '"mode"])', "same run name")],
)
def test_duplicates_are_refused(command, project, old, new, says):
  (project / "fake" / "configs" / "base.py").write_text(CONFIG.replace(old, new))
  assert command.launch() == 2
  assert says in command.err
  assert not command.experiments.exists()


def test_dry_run_of_1000_settings_takes_less_than_a_second(project):
  file = project / "fake" / "configs" / "base.py"
  file.write_text(CONFIG.replace("[0, 1]", "range(500)"))
  argv = [sys.executable, "launch.py", "--main=fake.train", f"--config={file}", "--dry_run"]
  out = runs_within(1.0, argv, project)
  assert "1000 settings" in out


def test_no_tensorflow_is_imported_and_help_is_quick(project):
  code = (
    "import sys, launch, launch_eval, common.supervise, common.launchers, common.results;"
    "launch.main(['--main=fake.train', '--config=fake/configs/base.py', '--dry_run']);"
    "assert not [m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'keras', 'numpy')]"
  )
  subprocess.run([sys.executable, "-c", code], cwd=project, check=True, capture_output=True)
  for script in ("launch.py", "launch_eval.py"):
    assert "--jobs" in runs_within(0.5, [sys.executable, script, "--help"], project)


def test_status_is_quick_and_imports_no_tensorflow(command, project):
  assert command.launch_two("--xid=x") == 0
  argv = ["status", str(command.experiments / "x")]
  code = (
    f"import sys, launch; assert launch.main({argv!r}) == 0;"
    "assert not [m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'keras', 'numpy')]"
  )
  subprocess.run([sys.executable, "-c", code], cwd=project, check=True, capture_output=True)
  assert "2 DONE" in runs_within(0.5, [sys.executable, "launch.py", *argv], project)


# Sweeps


@pytest.mark.slow
def test_sweep_of_4_with_2_jobs_is_all_done(command, project, monkeypatch):
  monkeypatch.delenv("NTC_NUM_THREADS", raising=False)
  args = """--args=--note 'two words' --quote '"'"""
  assert command.launch("--jobs=2", "--gpus=4,7", "--xid=first", args) == 0
  assert command.states("first") == ["DONE"] * 4
  assert "4 DONE" in command.out
  record = json.loads((command.experiments / "first" / "experiment.json").read_text())
  assert [r["wid"] for r in record["runs"]] == [0, 1, 2, 3]
  assert record["executor"] == {"name": "local", "jobs": 2, "gpus": ["4", "7"]}
  assert (record["commit"], record["dirty"]) == (None, None)
  source = command.experiments / "first" / "source"
  gpus = set()
  for wid in range(4):
    run = command.run("first", wid)
    facts = json.loads((run.path / "facts.json").read_text())
    assert facts["argv"] == ["--workdir", str(run.path), "--note", "two words", "--quote", '"']
    assert facts["cwd"] == str(source)
    assert pathlib.Path(facts["file"]) == source / "fake" / "train.py"
    assert facts["env"]["NTC_NUM_THREADS"] == str(max(1, launchers.num_cpus() // 2))
    assert facts["env"]["NTC_DATA_DIR"] == str(configs.DATA_DIR)
    assert facts["env"]["NTC_TRAIN_DIR"] == str(configs.TRAIN_DIR)
    gpus.add(facts["env"]["CUDA_VISIBLE_DEVICES"])
    assert run.xid == "first"
  assert gpus == {"4", "7"}


@pytest.mark.slow
def test_rerun_keeps_to_the_number_of_threads_of_the_first_start(command, tmp_path, monkeypatch):
  """Another number sums in another order: the resumed run would end with other weights."""
  monkeypatch.setattr(launchers, "num_cpus", lambda: 8)

  def threads(xid):
    facts = json.loads((command.run(xid, 1).path / "facts.json").read_text())
    return facts["env"]["NTC_NUM_THREADS"]

  for xid, own, first in (("a", None, "4"), ("b", "3", "3")):
    needed = tmp_path / f"needed by {xid}"
    monkeypatch.delenv("NTC_NUM_THREADS", raising=False)
    if own:
      monkeypatch.setenv("NTC_NUM_THREADS", own)
    assert command.launch_two(f"--xid={xid}", f"--config.needs={needed}") == 1
    assert threads(xid) == first
    monkeypatch.setenv("NTC_NUM_THREADS", "5")
    needed.touch()
    assert command("rerun", xid, "--jobs=1") == 0
    assert threads(xid) == first


@pytest.mark.slow
def test_an_experiment_is_not_launched_twice(command):
  assert command.launch_two("--xid=x") == 0
  before = tree(command.experiments)
  assert command.launch("--xid=x") == 2
  assert "already" in command.err
  assert tree(command.experiments) == before


def test_experiments_dir_may_come_in_args(command, tmp_path, capsys):
  there = tmp_path / "there"
  argv = ["--main=fake.train", f"--config={command.config}:tiny", "--jobs=4"]
  assert launch.main([*argv, f"--args=--experiments_dir '{there}' --x 1"], command.project) == 0
  run = next(there.glob("*/wid=0-*"))
  argv = json.loads((run / "facts.json").read_text())["argv"]
  assert argv == ["--workdir", str(run), "--x", "1"]
  assert f"{there}" in capsys.readouterr().out


@pytest.mark.slow
def test_failing_setting_is_failed_and_rerun_alone_after_the_fix(command, tmp_path):
  needed = tmp_path / "needed file"
  assert command.launch("--xid=x", "--jobs=4", f"--config.needs={needed}") == 1
  assert command.states("x") == ["DONE", "FAILED", "DONE", "DONE"]
  assert "FileNotFoundError: needs" in command.out
  assert "log.txt" in command.out
  assert "rerun" in command.out
  state = command.run("x", 1).read_state()
  assert "Traceback" in state["traceback"]
  assert command("status", "x") == 0
  assert "1 FAILED" in command.out
  needed.touch()
  assert command("rerun", "x", "--wids=0,2-3") == 0
  assert "Nothing to rerun" in command.out
  assert command("rerun", "x", "--states=DONE") == 2
  assert command("rerun", "x", "--wids=7") == 2
  assert "0 to 3" in command.err
  times = [command.run("x", wid).read_state()["time"] for wid in range(4)]
  assert command("rerun", "x", "--states=FAILED", "--wids=1-2") == 0
  assert command.states("x") == ["DONE"] * 4
  again = [command.run("x", wid).read_state() for wid in range(4)]
  assert [a["time"] == t for a, t in zip(again, times)] == [True, False, True, True]
  assert again[1]["attempt"] == 2
  submitted = runs.read_jsonl(command.experiments / "x" / "submitted.jsonl")
  assert [len(record["ids"]) for record in submitted] == [4, 1]
  assert "traceback" not in again[1]


@pytest.mark.slow
def test_exit_0_without_end_mark_is_not_success(command):
  assert command.launch_two("--xid=x", "--config.mode=no mark") == 1
  assert command.states("x") == ["FAILED"] * 2
  assert "without its end mark" in command.out


@pytest.mark.slow
def test_then_eval_follows_each_training(command, tmp_path):
  needed = tmp_path / "needed"
  assert command.launch_two("--xid=x", "--then_eval=sample", f"--config.needs={needed}") == 1
  assert command.states("x") == ["DONE", "FAILED", "DONE", "CANCELLED"]
  trained = json.loads((command.run("x", 0).path / "facts.json").read_text())
  evaluated = json.loads((command.run("x", 0).path / "eval-sample" / "facts.json").read_text())
  assert evaluated["time"] > trained["time"]
  assert evaluated["cwd"] == trained["cwd"]
  needed.touch()
  assert command("rerun", "x") == 0
  assert command.states("x") == ["DONE"] * 4


def hear_signals():
  """For a child: what a shell runs in its background ignores SIGINT, and so would its children."""
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)


def wait_mode(command, tmp_path, *argv):
  """A launcher process whose two running tasks wait for a file or a signal."""
  script = [sys.executable, "launch.py", "--main=fake.train", "--config=fake/configs/base.py"]
  script += [
    "--config.num_steps=2",
    "--config.mode=wait",
    f"--config.needs={tmp_path / 'go'}",
    "--xid=x",
    "--jobs=2",
  ]
  script += [f"--experiments_dir={command.experiments}", *argv]
  process = subprocess.Popen(
    script,
    cwd=command.project,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
    preexec_fn=hear_signals,
  )

  def running():
    found = list(command.experiments.glob("x/wid=*"))
    return sum("step" in runs.RunDir(p).read_state() for p in found) == 2

  try:
    wait_for(running)
  except BaseException:
    process.terminate()
    raise
  return process


@pytest.mark.parametrize(
  "sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_signal_to_the_launcher_requeues_and_rerun_completes(command, tmp_path, sent):
  process = wait_mode(command, tmp_path)
  process.send_signal(sent)
  out, _ = process.communicate(timeout=20)
  assert process.returncode == runs.EXIT_RESUME
  assert command.states("x") == ["REQUEUED", "REQUEUED", "PENDING", "PENDING"]
  assert "./launch.py rerun" in out
  assert (command.run("x", 0).path / "saved").exists()
  (tmp_path / "go").touch()
  # Written on Linux as a shell would take it, and found by its path.
  assert launch.main(["rerun", str(command.experiments / "x")], command.project) == 0
  assert command.states("x") == ["DONE"] * 4


@pytest.mark.slow
def test_sigkill_of_a_task_names_the_signal(command, tmp_path):
  process = wait_mode(command, tmp_path)
  os.kill(command.run("x", 0).read_state()["pid"], signal.SIGKILL)
  (tmp_path / "go").touch()
  out, _ = process.communicate(timeout=20)
  assert process.returncode == 1
  assert command.states("x") == ["FAILED", "DONE", "DONE", "DONE"]
  assert "killed by SIGKILL" in out


@pytest.mark.slow
def test_running_experiment_is_shown_guarded_and_cancelled(command, tmp_path):
  process = wait_mode(command, tmp_path)
  assert command("status", "x") == 0
  assert "2 PENDING, 2 RUNNING" in command.out
  assert "1/2" in command.out
  assert command("rerun", "x") == 2
  assert "in use by process" in command.err
  assert command("cancel", "x") == 0
  process.communicate(timeout=20)
  assert process.returncode == 1
  assert command.states("x") == ["CANCELLED"] * 4
  assert command("rerun", "x") == 1
  assert "4 CANCELLED" in command.out
  (tmp_path / "go").touch()
  assert command("rerun", "x", "--states=CANCELLED", "--jobs=4") == 0


@pytest.mark.slow
def test_killed_supervisor_is_lost_and_rerun(command, tmp_path):
  process = wait_mode(command, tmp_path)
  os.kill(command.run("x", 1).read_state()["supervisor_pid"], signal.SIGKILL)
  (tmp_path / "go").touch()
  process.communicate(timeout=20)
  assert process.returncode == 1
  assert command.states("x") == ["DONE", "LOST", "DONE", "DONE"]
  assert command("rerun", "x", "--states=LOST") == 0


@pytest.mark.slow
def test_second_ctrl_c_kills_tasks_that_do_not_listen(command, tmp_path):
  (command.project / "fake" / "train.py").write_text(TRAIN.replace("stop.append(n)", "None"))
  process = wait_mode(command, tmp_path)
  process.send_signal(signal.SIGINT)
  while "Ctrl-C again" not in process.stdout.readline():
    pass
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=20)
  assert "killed by SIGKILL, as asked" in out
  assert command.states("x")[:2] == ["FAILED", "FAILED"]


# A full disk


def full_disk(monkeypatch, state):
  write = runs.RunDir.write_state

  def write_state(run, given, **facts):
    if given == state:
      raise OSError(errno.ENOSPC, "No space left on device", str(run.state_file))
    write(run, given, **facts)

  monkeypatch.setattr(runs.RunDir, "write_state", write_state)


@pytest.mark.slow
def test_launcher_goes_on_where_an_end_cannot_be_recorded(command, tmp_path, monkeypatch):
  """The supervisors of wid 0 and 1 die without a word, and the launcher cannot write either."""
  package = command.project / "common" / "supervise.py"
  dies = "\nif 'wid=0' in ' '.join(sys.argv) or 'wid=1' in ' '.join(sys.argv): os._exit(3)\n"
  text = package.read_text()
  package.write_text(text.replace("\nLOG_TAIL_LINES", dies + "LOG_TAIL_LINES"))
  full_disk(monkeypatch, "FAILED")
  assert command.launch("--xid=x") == 1
  assert "2 DONE, 2 FAILED" in command.out
  assert "Warning: " in command.err
  assert "No space left" in command.err
  assert "wid=0-rd_lambda=0.08-seed=0: FAILED (its supervisor exited with 3" in command.err


def test_a_done_that_the_supervisor_disowned_is_not_shown(tmp_path, monkeypatch, capsys):
  job = launchers.Job("a", (), runs.RunDir(tmp_path), tmp_path, {})
  job.folder.write_state("DONE")
  full_disk(monkeypatch, "FAILED")
  executor = launchers.LocalExecutor()
  executor._settle(job, 1)
  assert executor.observe(job)["state"] == "DONE"
  executor._settle(job, supervise.EXIT_UNRECORDED)
  text, counts = launchers.states_table([job], executor.observe)
  assert counts == {"FAILED": 1}
  assert "could not be recorded" in text
  assert "Warning: a: FAILED" in capsys.readouterr().err


@pytest.mark.parametrize(("cancelled", "state"), [(False, "REQUEUED"), (True, "CANCELLED")])
def test_a_stop_that_the_supervisor_could_not_record(tmp_path, cancelled, state):
  job = launchers.Job("a", (), runs.RunDir(tmp_path), tmp_path, {})
  job.folder.write_state("RUNNING", pid=dead_pid())
  if cancelled:
    job.folder.cancel_file.touch()
  launchers.LocalExecutor()._settle(job, runs.EXIT_RESUME)
  assert job.folder.read_state()["state"] == state


def test_submission_that_cannot_be_noted_stops_nothing(command, monkeypatch):
  def append(path, record):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(runs, "append_jsonl", append)
  assert command.launch_two("--xid=x") == 0
  assert "Warning: the submission" in command.err


@pytest.mark.slow
def test_rerun_leaves_out_a_run_whose_disk_is_full(command, tmp_path, monkeypatch):
  assert command.launch_two("--xid=x", "--config.mode=no mark", "--then_eval=sample") == 1
  note = runs.RunDir.note_state

  def note_state(run, state, **facts):
    if "wid=0" in str(run.path):
      raise OSError(errno.ENOSPC, "No space left on device", str(run.state_file))
    note(run, state, **facts)

  monkeypatch.setattr(runs.RunDir, "note_state", note_state)
  source = command.experiments / "x" / "source" / "fake" / "train.py"
  source.write_text(TRAIN.replace("no mark", "none"))
  assert command("rerun", "x", "--states=FAILED,CANCELLED") == 1
  assert "Warning: wid=0-rd_lambda=0.08-seed=0: not submitted again" in command.err
  assert "No space left" in command.err
  assert command.states("x") == ["FAILED", "DONE", "CANCELLED", "DONE"]
  assert command("rerun", "x") == 2
  assert command.err.startswith("Error: wid=0-rd_lambda=0.08-seed=0: not submitted again")


# Folders that cannot be made, and creations that were killed


@pytest.mark.parametrize("more", [[], ["--xid=x"]])
def test_experiments_dir_that_cannot_be_made_is_one_line(command, tmp_path, more):
  (tmp_path / "file").touch()
  command.experiments = tmp_path / "file" / "x"
  assert command.launch_two(*more) == 2
  assert command.err.startswith("Error: ")
  assert command.err.count("\n") == 1
  assert "Cannot make an experiment in" in command.err
  assert "Not a directory" in command.err


KILLED = """
import os, signal, sys
import launch
from common import runs
write = runs.atomic_write
def atomic_write(path, *rest):
  if path.name == sys.argv[1]:
    os.kill(os.getpid(), signal.SIGKILL)
  write(path, *rest)
runs.atomic_write = atomic_write
if sys.argv[1] == "some runs are made":
  create_new = runs.RunDir.create_new
  def create_some(run, unit, xid):
    if unit.wid == 2:
      os.kill(os.getpid(), signal.SIGKILL)
    create_new(run, unit, xid)
  runs.RunDir.create_new = create_some
launch.main(sys.argv[2:])
"""


def kill_creation(command, at):
  argv = ["--main=fake.train", f"--config={command.config}", "--xid=x"]
  argv.append(f"--experiments_dir={command.experiments}")
  script = [sys.executable, "-c", KILLED, at, *argv]
  done = subprocess.run(script, cwd=command.project, capture_output=True)
  assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("at", ["some runs are made", "experiment.json"])
def test_killed_creation_is_made_anew(command, at):
  kill_creation(command, at)
  stale = command.experiments / "x" / "source" / "stale.py"
  stale.touch()
  assert not (command.experiments / "x" / "experiment.json").exists()
  assert command.launch_two("--xid=x") == 0
  assert command.states("x") == ["DONE"] * 2
  assert len(list((command.experiments / "x").glob("wid=*"))) == 2
  assert not stale.exists()


@pytest.mark.parametrize(
  "what", ["checkpoints/step-1", "lock", "state", "notes.txt", "being made", "file"]
)
def test_what_is_no_unfinished_creation_is_not_touched(command, what):
  path = command.experiments / "x"
  run = runs.RunDir(path / "wid=0-by hand")
  runs.write_json(run.work_unit_file, {})
  run.write_state("RUNNING" if what == "state" else "PENDING")
  if what == "notes.txt":
    (path / what).touch()
  elif what == "file":
    shutil.rmtree(path)
    path.touch()
  elif what not in ("state", "being made"):
    (run.path / what).mkdir(parents=True)
  before = tree(command.experiments)
  if what == "being made":
    with runs.holding(path / "launcher.lock", "it"):
      assert command.launch_two("--xid=x") == 2
    assert "being made by process" in command.err
    (path / "launcher.lock").unlink()
  else:
    assert command.launch_two("--xid=x") == 2
    assert "choose another --xid" in command.err
  assert tree(command.experiments) == before


# States


def dead_pid():
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  return process.pid


def test_running_without_lock_and_process_is_lost(tmp_path):
  run = runs.RunDir(tmp_path)
  run.write_state("RUNNING", pid=dead_pid(), host=socket.gethostname(), step=3)
  assert launchers.observe(run)["state"] == "LOST"
  assert run.read_state()["state"] == "RUNNING"  # Looking writes nothing.
  with run.locked():
    assert launchers.observe(run)["state"] == "RUNNING"
  run.write_state("RUNNING", pid=os.getpid())
  assert launchers.observe(run)["state"] == "RUNNING"
  # Its supervisor would hold a lock; the number is another process's by now.
  run.write_state("RUNNING", supervisor_pid=os.getpid())
  assert launchers.observe(run)["state"] == "LOST"
  run.write_state("RUNNING", host="elsewhere")
  assert launchers.observe(run)["state"] == "RUNNING"


def test_status_names_what_there_is(command):
  command.launch_two("--xid=abc")
  assert command("status", "abd") == 2
  assert "abc" in command.err
  assert command("status") == 2
  assert command("stauts", "abc") == 2
  assert "status" in command.err


# The snapshot


@pytest.fixture
def checkout(project):
  def git(*args):
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@e", "-C", str(project), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

  git("init", "-q")
  (project / ".gitignore").write_text("ignored/\n*.big\n__pycache__/\n")
  git("add", "-A")
  git("commit", "-qm", "all")
  return git


def test_snapshot_is_the_tree_as_it_is_and_git_is_only_read(command, project, checkout):
  (project / "fake" / "eval.py").write_text(EVAL + "# edited\n")
  (project / "ünew 'file'.py").write_text("new")
  (project / "ignored").mkdir()
  (project / "ignored" / "x.py").touch()
  (project / "data.big").touch()
  (project / "launch_eval.py").unlink()
  (project / "link").symlink_to("fake/train.py")
  inside = project / "runs here"  # Not ignored by git, and still no source.
  (inside / "old").mkdir(parents=True)
  (inside / "old" / "x.py").touch()
  head = checkout("rev-parse", "HEAD").strip()
  for path in project.rglob("*.py"):
    os.utime(path)  # `git status` would note the new times in the index.
  index = (project / ".git" / "index").read_bytes()
  command.experiments = inside
  assert command.launch_two("--xid=x") == 0
  assert (project / ".git" / "index").read_bytes() == index
  source = inside / "x" / "source"
  assert (source / "fake" / "eval.py").read_text().endswith("# edited\n")
  assert (source / "ünew 'file'.py").exists()
  assert str((source / "link").readlink()) == "fake/train.py"
  for name in ("ignored", "data.big", "launch_eval.py", ".git", "runs here"):
    assert not (source / name).exists(), name
  record = launchers.find_experiment("x", inside).record
  assert (record["commit"], record["dirty"]) == (head, True)
  assert "# edited" in (inside / "x" / "source.patch").read_text()
  environment = json.loads((command.run("x", 0).environment_file).read_text())
  assert (environment[-1]["commit"], environment[-1]["dirty"]) == (head, True)


@pytest.mark.slow
def test_rerun_uses_the_snapshot(command, project, tmp_path):
  needed = tmp_path / "needed"
  assert command.launch_two("--xid=x", f"--config.needs={needed}") == 1
  (project / "fake" / "train.py").write_text("raise SystemExit('edited meanwhile')")
  needed.touch()
  assert command("rerun", "x") == 0


def test_snapshot_without_git_takes_text_files(project, tmp_path):
  (project / "notes.md").touch()
  (project / "picture.png").touch()
  (project / ".venv").mkdir()
  (project / ".venv" / "x.py").touch()
  launchers.snapshot(project, tmp_path / "copy")
  copied = {str(p.relative_to(tmp_path / "copy")) for p in tree(tmp_path / "copy")}
  assert {"notes.md", "fake/train.py", "common/supervise.py"} <= copied
  assert not {"picture.png", ".venv"} & copied


def test_failed_creation_leaves_nothing(command, project, checkout):
  (project / ".gitignore").write_text("fake/train.py\n__pycache__/\n")
  checkout("rm", "-q", "--cached", "fake/train.py")
  assert command.launch("--xid=x") == 2
  assert "fake/train.py" in command.err
  assert not (command.experiments / "x").exists()


# Evaluation


def evaluate(command, capsys, *argv):
  code = launch_eval.main(list(argv), command.project)
  return code, *capsys.readouterr()


@pytest.mark.slow
def test_launch_eval_evaluates_each_run_beside_its_training_state(command, capsys, tmp_path):
  command.launch_two("--xid=x", f"--config.needs={tmp_path / 'needed'}")
  before = [command.run("x", wid).read_state() for wid in range(2)]
  argv = [f"--workdirs={command.experiments}/x/wid=*", "--dataset=sample", "--jobs=2"]
  files = tree(tmp_path)
  code, out, _ = evaluate(command, capsys, *argv, "--dry_run")
  assert (code, out.count("fake.eval")) == (0, 2)
  assert tree(tmp_path) == files
  code, out, _ = evaluate(command, capsys, *argv, "--args=--skip_existing 'a b'")
  assert code == 1
  assert "1 DONE, 1 FAILED" in out
  assert [command.run("x", wid).read_state() for wid in range(2)] == before
  job = command.run("x", 0).path / "eval-sample"
  facts = json.loads((job / "facts.json").read_text())
  assert facts["cwd"] == str(command.project)
  assert facts["argv"][-2:] == ["--skip_existing", "a b"]
  assert "no checkpoint" in (command.run("x", 1).path / "eval-sample" / "log.txt").read_text()
  code, _, _ = evaluate(command, capsys, *argv, "--use_snapshot")
  facts = json.loads((job / "facts.json").read_text())
  assert facts["cwd"] == str(command.experiments / "x" / "source")


@pytest.mark.slow
def test_launch_eval_leaves_out_experiments_that_are_put_aside(command, capsys, tmp_path):
  for xid in ("x", "_old"):
    command.launch_two(f"--xid={xid}", f"--config.needs={tmp_path / 'needed'}")
  rest = ("--dataset=sample", "--dry_run")
  _, out, _ = evaluate(command, capsys, f"--workdirs={command.experiments}/*", *rest)
  assert out.count("fake.eval") == 2 and "_old" not in out
  _, out, _ = evaluate(command, capsys, f"--workdirs={command.experiments}/_old/wid=*", *rest)
  assert out.count("fake.eval") == 2 and "_old" in out
  code, _, err = evaluate(command, capsys, f"--workdirs={command.experiments}/_*", *rest)
  assert code == 2 and "name one" in err
  argv = [f"--workdirs={command.experiments}/x", *rest]
  _, out, _ = evaluate(command, capsys, *argv, "--skip=wid=0-*")
  assert out.count("fake.eval") == 1 and "wid=0-" not in out
  code, _, err = evaluate(command, capsys, *argv, "--skip=wid=*")
  assert code == 2 and "--skip=wid=* leaves out all 2 runs" in err


@pytest.mark.slow
@pytest.mark.parametrize(
  ("dataset", "args"),
  [("photos", "--results_dir=out --save_dir ~/s"), ("img?.png", "--save_dir=s --results_dir out")],
)
def test_launch_eval_finds_what_is_relative_to_the_users_folder(
  command, capsys, tmp_path, monkeypatch, dataset, args
):
  command.launch_two("--xid=x")
  here = tmp_path / "here"
  (here / "photos").mkdir(parents=True)
  for path in (here / "photos" / "a.png", here / "img1.png"):
    path.write_bytes(png())
  monkeypatch.chdir(here)
  monkeypatch.setenv("HOME", str(tmp_path))
  rest = [f"--dataset={dataset}", f"--args={args}"]
  code, _, err = evaluate(command, capsys, f"--workdirs={command.experiments}/x", *rest)
  assert code == 2 and "--save_pictures keeps each run's" in err
  code, _, err = evaluate(command, capsys, f"--workdirs={command.run('x', 0).path}", *rest)
  assert code == 0, err
  facts = json.loads(next(command.run("x", 0).path.glob("eval-*/facts.json")).read_text())
  given = " ".join(facts["argv"])
  assert f"--dataset {here / dataset} " in given
  assert str(here / "out") in given
  assert str(tmp_path / "s" if "~" in args else here / "s") in given


def png():
  header = b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
  pixels = b"IDAT" + zlib.compress(b"\0\1\2\3")
  parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
           for c in (header, pixels, b"IEND"))  # fmt: skip
  return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_folders_in_args_are_absolute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = "--results_dir=a -save_dir 'b c' --experiments_dir /d --other e --save_dir"
  assert launch.split_args(text, []) == [
    f"--results_dir={tmp_path / 'a'}", "-save_dir", str(tmp_path / "b c"),
    "--experiments_dir", "/d", "--other", "e", "--save_dir",
  ]  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_launch_eval_refuses_an_unknown_dataset_before_anything_is_written(
  command, capsys, tmp_path, more
):
  command.launch_two("--xid=x")
  before = tree(tmp_path)
  argv = [f"--workdirs={command.experiments}/x", "--dataset=kodac", *more]
  code, out, err = evaluate(command, capsys, *argv)
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert "kodac" in err
  assert "kodak" in err
  assert tree(tmp_path) == before


@pytest.mark.slow
def test_launch_eval_that_cannot_write_is_one_line(command, capsys):
  command.launch_two("--xid=x")
  (command.run("x", 0).path / "eval-sample").touch()
  argv = [f"--workdirs={command.experiments}/x/wid=0-*", "--dataset=sample"]
  code, _, err = evaluate(command, capsys, *argv)
  assert (code, err.count("\n")) == (2, 1)
  assert "eval-sample" in err


def test_launch_eval_mistakes(command, capsys):
  for argv, says in (
    (["--dataset=kodak"], "--workdirs"),
    (["--workdirs=nowhere*"], "--dataset"),
    (["--workdirs=nowhere*", "--dataset=kodak"], "No run directory matches"),
    (["--workdirs=x", "--dataset=kodak", "--args=--job_dir x"], "--job_dir"),
  ):
    code, _, err = evaluate(command, capsys, *argv)
    assert code == 2
    assert says in err


def test_eval_folders_of_two_globs_differ(tmp_path):
  run = runs.RunDir(tmp_path)
  names = [
    launchers.eval_job(run, "fake", dataset, tmp_path, {}).folder.path.name
    for dataset in ("kodak", "/a/b*.png", "/a_b*.png")
  ]
  assert names[0] == "eval-kodak"
  assert len(set(names)) == 3


# Progress


class Screen:
  def __init__(self, tty):
    self.text, self.tty = "", tty

  def write(self, text):
    self.text += text

  def flush(self):
    pass

  def isatty(self):
    return self.tty


@pytest.mark.parametrize("tty", [False, True])
def test_progress_shows_steps_and_ends(tmp_path, tty):
  job = launchers.Job("job-a", (), runs.RunDir(tmp_path), tmp_path, {})
  screen = Screen(tty)
  progress = launchers.Progress([job], screen, interval=0.0)
  progress.update({"job-a": "PENDING"})
  job.folder.write_state("RUNNING", step=3, num_steps=12, detail="loss=0.5")
  progress.update({"job-a": "RUNNING"})
  assert "3/12" in screen.text
  assert "loss=0.5" in screen.text
  job.folder.write_state("FAILED", reason="because")
  progress.update({})
  progress.close()
  assert "job-a: FAILED (because)" in screen.text


def test_the_newest_experiments_are_the_newest_by_time(command, tmp_path):
  for i, name in enumerate(("9", "10", "2", "100", "1", "8")):
    file = command.experiments / name / "experiment.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    os.utime(file, (i, i))
  assert command("status", "nowhere") == 2
  assert "The newest there: 10, 2, 100, 1, 8." in command.err


def test_parse_wids():
  assert launch.parse_wids("3,7-9", range(10)) == {3, 7, 8, 9}
  for text in ("", "a", "3-", "-3", "9-12", "3,12-15", "0-99999999999"):
    with pytest.raises(Exception, match="--wids"):
      launch.parse_wids(text, range(10))


def test_work_units_hold_no_tuples_after_json(command):
  unit = hyper.expand(hyper.load(command.config), "fake", "train")[0]
  assert hyper.WorkUnit.from_json(json.loads(json.dumps(unit.to_json()))) == unit


# The interpreter


def bare_python(project, *argv):
  """Runs a script with a Python that has no installed packages."""
  return subprocess.run(
    [sys.executable, "-S", *argv], cwd=project, capture_output=True, text=True, check=False
  )


@pytest.mark.parametrize("script", ["launch.py", "launch_eval.py"])
def test_scripts_start_anew_in_the_projects_venv(project, script):
  done = bare_python(project, script, "--dry_run")
  assert done.returncode == 2
  assert "scripts/setup_venv.sh" in done.stderr
  python = project / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/sh\necho "anew: $*"\n')
  python.chmod(0o755)
  done = bare_python(project, script, "--dry_run", "a b")
  assert done.stdout == f"anew: {project / script} --dry_run a b\n"
