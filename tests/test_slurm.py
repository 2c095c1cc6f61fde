# ruff: noqa: F811
"""The Slurm executor on a fake cluster (tests/fake_slurm.py): records, faults, signals, reruns."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import launch_eval
import slurm_template
from common import launchers, runs, slurm
from tests import fake_slurm
from tests.test_launch import command, hear_signals, project, runs_within, tree  # noqa: F401
from tests.test_launch import wait_for as wait_some_seconds

ROOT = pathlib.Path(__file__).resolve().parent.parent


def wait_for(condition):
  wait_some_seconds(condition, 60.0)


class Cluster:
  """What a test does to the fake cluster."""

  def __init__(self, folder):
    self.variables = fake_slurm.install(folder)
    self.state = folder / "state"

  def fault(self, name, there=True, text=""):
    (self.state / name).write_text(text) if there else (self.state / name).unlink()

  def arrays(self):
    return [fake_slurm.Array(p.name) for p in sorted(self.state.iterdir()) if p.name.isdigit()]

  def states(self, xid):
    array = fake_slurm.Array(xid)
    return [array.read(index)["state"] for index in array.tasks()]

  def wait(self):
    def over():
      return all(s in fake_slurm.ENDED for a in self.arrays() for s in self.states(a.xid))

    wait_for(over)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  found = Cluster(tmp_path / "cluster")
  for name, value in found.variables.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr("configs.EXECUTOR", "slurm")
  monkeypatch.setattr("configs.SLURM_DIR", tmp_path / "slurm jobs")
  monkeypatch.setattr(slurm, "_LOOK_AGAIN_SECONDS", 0.0)
  for name in [n for n in os.environ if n.startswith(("SLURM_", "SBATCH_"))]:
    monkeypatch.delenv(name)
  yield found
  for array in found.arrays():
    if (array.path / "server.txt").exists():  # Some of its tasks may run.
      fake_slurm.scancel([array.xid])


def submit(command, *argv, **more):
  """Launches; returns the experiment's id."""
  code = command.launch(*argv, **more)
  assert code == 0, command.err + command.out
  return next(line.split()[1][:-1] for line in command.out.splitlines() if "Experiment" in line)


def status(command, xid):
  """Every job's state as `status` shows it, after one call."""
  assert command("status", xid) == 0
  rows = [line.split() for line in command.out.splitlines() if line.startswith("wid=")]
  return [row[1] for row in rows]


# Submission


def test_sweep_of_4_goes_through_as_one_array(command, cluster):
  xid = submit(command, "--args=--note 'two words'", "--sargs=--partition=debug --time=1")
  (array,) = cluster.arrays()
  assert (array.xid, array.job()["array"]) == (xid, "0-3")
  argv = json.loads((array.path / "argv.json").read_text())
  assert argv[-2:] == ["--partition=debug", "--time=1"]
  experiment = command.experiments / xid
  assert (experiment / "sbatch" / f"{xid}.sh").read_text() == (array.path / "script.sh").read_text()
  cluster.wait()
  assert cluster.states(xid) == ["COMPLETED"] * 4
  assert status(command, xid) == ["DONE"] * 4
  record = json.loads((experiment / "experiment.json").read_text())
  assert record["executor"]["sargs"] == ["--partition=debug", "--time=1"]
  assert [r["overrides"]["seed"] for r in record["runs"]] == [0, 1, 0, 1]
  for wid in range(4):
    run = command.run(xid, wid)
    facts = json.loads((run.path / "facts.json").read_text())
    assert facts["argv"] == ["--workdir", str(run.path), "--note", "two words"]
    assert facts["cwd"] == str(experiment / "source")
    assert run.read_state()["slurm_job"] == f"{xid}_{wid}"
    assert run.xid == xid
    assert (experiment / "logs" / f"{xid}_{wid}.txt").exists()


def test_dry_run_shows_the_batch_script_and_needs_no_slurm(command, project, tmp_path):
  before = tree(tmp_path)
  argv = ["--dry_run", "--executor=slurm", "--then_eval=sample", "--sargs=--mem '4 G'", "--jobs=2"]
  assert command.launch(*argv) == 0
  assert tree(tmp_path) == before
  for part in ("#SBATCH --array=0-3%2", "--signal=B:USR2@", "'--mem' '4 G'", "aftercorr", "4 sett"):
    assert part.replace("'--mem'", "--mem") in command.out
  assert "common.slurm" in command.out


def test_dry_run_on_this_machine_shows_no_batch_script(command, monkeypatch):
  monkeypatch.setattr("configs.EXECUTOR", "local")
  assert command.launch("--dry_run") == 0
  assert "#SBATCH" not in command.out


def test_without_slurm_the_error_names_the_fix(command, tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  for argv in (["--executor=slurm"], ["--executor=slurm", "--test_only"]):
    assert command.launch(*argv) == 2
    assert "sbatch" in command.err
    assert "--executor=local" in command.err
  assert not command.experiments.exists()


@pytest.mark.slow
def test_executor_is_chosen_by_what_is_there(command, cluster, tmp_path, monkeypatch):
  monkeypatch.setattr("configs.EXECUTOR", "")
  submit(command, config=f"{command.config}:tiny")
  assert len(cluster.arrays()) == 1
  monkeypatch.setenv("PATH", "/nowhere")
  assert command.launch("--sargs=--partition=gpu", config=f"{command.config}:tiny") == 0
  assert "no sbatch here" in command.out
  assert "2 DONE" in command.out
  assert command.launch("--executor=local", "--sargs=--partition=gpu") == 2
  cluster.wait()


def test_test_only_submits_nothing(command, cluster):
  assert command.launch("--test_only") == 0
  assert "to start at" in command.out
  assert cluster.arrays() == []
  assert not command.experiments.exists()


@pytest.mark.parametrize(
  ("sargs", "says"),
  [
    ("--array=0-3", "set by the launcher"),
    ("-W", "set by the launcher"),
    ("--clusters=other", "set by the launcher"),
    ("-Mother", "set by the launcher"),
    ("--outp=x", "set by the launcher"),
    ("--sig=USR1@60", "B:USR2"),
    ("nonsense.sh", "batch script"),
    ("--partition=gpu nonsense.sh", "batch script"),
    ("--hold nonsense.sh", "batch script"),
    ("-pgpu nonsense.sh", "batch script"),
    ("--signal=USR1@60", "B:USR2"),
    ("it's", "quotation"),
  ],
)
def test_wrong_sargs_stop_before_anything_is_written(command, cluster, sargs, says):
  assert command.launch(f"--sargs={sargs}") == 2
  assert says in command.err
  assert cluster.arrays() == []
  assert not command.experiments.exists()


def test_refused_submission_leaves_nothing_and_gives_slurms_words(command, cluster):
  cluster.fault("sbatch-refuses-1")
  assert command.launch() == 2
  assert "Job violates accounting policy" in command.err
  assert not command.experiments.exists()


def test_array_that_went_to_another_cluster_is_cancelled(command, cluster):
  cluster.fault("foreign-cluster")
  assert command.launch() == 2
  assert "cluster 'other'" in command.err
  (array,) = cluster.arrays()
  assert cluster.states(array.xid) == ["CANCELLED"] * 4
  assert not command.experiments.exists()


def test_what_sbatch_says_of_a_job_that_it_takes_is_shown(command, cluster):
  cluster.fault("nothing-starts")
  cluster.fault("sbatch-says", text="sbatch: your quota is nearly spent")
  submit(command)
  assert "your quota is nearly spent" in command.err


@pytest.mark.slow
def test_wrong_arguments_for_the_tasks_stop_before_anything_is_submitted(command, cluster, capsys):
  command.project = ROOT
  config = "factorized/configs/bls2017.py:tiny"
  for args, says in (("--nonsense", "nonsense"), ("x", "Left over"), ("--help", "--help")):
    assert command.launch(f"--args={args}", main="factorized.train", config=config) == 2
    assert says in command.err
  assert cluster.arrays() == []
  cluster.fault("nothing-starts")
  xid = submit(command, "--args=--alsologtostderr", main="factorized.train", config=config)
  argv = [f"--workdirs={command.experiments / xid}", "--dataset=sample"]
  for args in ("--nonsense", "--mode=nonsense"):
    assert launch_eval.main([*argv, f"--args={args}"], ROOT) == 2
    said = capsys.readouterr().err
    assert "--args: " in said and "nonsense" in said
  assert len(cluster.arrays()) == 1


def test_peoples_own_views_do_not_hide_tasks(monkeypatch):
  for name in ("SQUEUE_PARTITION", "SACCT_FORMAT", "SCANCEL_PARTITION", "NTC_WORKERS"):
    monkeypatch.setenv(name, "x")
    assert name not in slurm.environment()


def test_failed_creation_takes_the_array_back(command, cluster, monkeypatch):
  monkeypatch.setattr(launchers, "snapshot", lambda *args, **kwargs: 0)  # It lacks the task.
  assert command.launch() == 2
  assert "snapshot lacks" in command.err
  (array,) = cluster.arrays()
  assert cluster.states(array.xid) == ["CANCELLED"] * 4


@pytest.mark.slow
def test_variables_of_an_outer_job_do_not_leak(command, cluster, monkeypatch):
  monkeypatch.setenv("SLURM_JOB_ID", "7")
  monkeypatch.setenv("SLURM_MEM_PER_CPU", "3")
  monkeypatch.setenv("SBATCH_PARTITION", "x")
  monkeypatch.setenv("SRUN_DEBUG", "3")
  monkeypatch.setenv("SLURMD_NODENAME", "n9")
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
  monkeypatch.setenv("SLURM_CONF", "/a/slurm.conf")
  submit(command)
  environment = json.loads((cluster.arrays()[0].path / "environment.json").read_text())
  names = {n for n in environment if n.startswith(("SLURM", "SBATCH_", "SRUN_", "CUDA_V"))}
  assert names == {"SLURM_CONF"}
  cluster.wait()


def test_variables_outside_of_a_job_are_the_users(command, cluster, monkeypatch):
  monkeypatch.setenv("SBATCH_PARTITION", "x")
  submit(command, "--sargs=--hold")
  environment = json.loads((cluster.arrays()[0].path / "environment.json").read_text())
  assert environment["SBATCH_PARTITION"] == "x"


@pytest.mark.slow
def test_large_sweep_goes_in_chunks_and_one_may_be_refused(command, cluster, project):
  file = project / "fake" / "configs" / "base.py"
  file.write_text(file.read_text().replace("[0, 1]", "range(4)"))
  (cluster.state / "max_array_size").write_text("3")
  cluster.fault("sbatch-refuses-2")
  assert command.launch("--then_eval=sample") == 1
  xid = cluster.arrays()[0].xid
  assert "accounting policy" in command.err
  assert f"Submitted: run 0-2 as {xid}." in command.err
  assert "Not submitted: wid 0-7" in command.err  # Their evaluations, or all of them.
  assert f"rerun {command.experiments}/{xid}".replace(" ", "") in command.err.replace(
    "'", ""
  ).replace(" ", "")
  cluster.wait()
  shown = status(command, xid)
  assert shown[:8] == ["DONE"] * 3 + ["PENDING"] * 5
  assert "not submitted" in command.out
  assert command("rerun", xid) == 0, command.err
  assert [a.job()["array"] for a in cluster.arrays()] == ["0-2", "0-2", "0-2", "0-1", "0-2", "0-1"]
  cluster.wait()
  assert command("status", xid) == 0
  assert "16 DONE" in command.out


def test_1000_settings_are_one_sbatch_and_quick(command, cluster, project):
  cluster.fault("nothing-starts")
  file = project / "fake" / "configs" / "base.py"
  file.write_text(file.read_text().replace("[0, 1]", "range(500)"))
  argv = [sys.executable, "launch.py", "--main=fake.train", f"--config={file}"]
  argv.append(f"--experiments_dir={command.experiments}")
  assert "1000 jobs" in runs_within(2.0, argv, project)
  calls = len((cluster.state / "sbatch-calls").read_text())
  assert calls == len(list(command.experiments.iterdir())) == len(cluster.arrays())
  xid = cluster.arrays()[0].xid
  assert len(list((command.experiments / xid).glob("wid=*"))) == 1000
  assert "1000 PENDING" in runs_within(
    2.0, [sys.executable, "launch.py", "status", str(command.experiments / xid)], project
  )


@pytest.mark.slow
def test_run_directories_of_a_large_sweep_are_made_by_the_jobs(command, cluster, monkeypatch):
  monkeypatch.setattr(launchers, "MOST_FOLDERS_AT_ONCE", 3)
  cluster.fault("nothing-starts")
  xid = submit(command)
  experiment = command.experiments / xid
  assert list(experiment.glob("wid=*")) == []
  assert status(command, xid) == ["PENDING"] * 4
  cluster.fault("nothing-starts", there=False)
  fake_slurm._start(cluster.arrays()[0])
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 4
  values = [command.run(xid, wid).read_work_unit().config for wid in range(4)]
  assert [v["model_config"]["rd_lambda"] for v in values] == [0.08, 0.08, 0.01, 0.01]
  assert [v["seed"] for v in values] == [0, 1, 0, 1]
  assert [v["num_steps"] for v in values] == [4] * 4


@pytest.mark.slow
def test_100000_settings_are_expanded_and_submitted_in_chunks_quickly(command, cluster, project):
  cluster.fault("nothing-starts")
  file = project / "fake" / "configs" / "base.py"
  file.write_text(file.read_text().replace("[0, 1]", "range(50_000)"))
  argv = [sys.executable, "launch.py", "--main=fake.train", f"--config={file}"]
  argv.append(f"--experiments_dir={command.experiments}")
  assert "Submitted 100000 jobs to Slurm in 100 arrays" in runs_within(10.0, argv, project)
  assert [a.job()["array"] for a in cluster.arrays()[98:100]] == ["0-1000", "0-900"]


@pytest.mark.slow
def test_status_of_10000_runs_is_quick(command, cluster, project):
  cluster.fault("nothing-starts")
  file = project / "fake" / "configs" / "base.py"
  file.write_text(file.read_text().replace("[0, 1]", "range(5000)"))
  xid = submit(command)
  assert "10000 jobs to Slurm in 10 arrays" in command.out
  for wid in range(10_000):
    name = f"wid={wid}-rd_lambda={0.08 if wid < 5000 else 0.01}-seed={wid % 5000}"
    run = runs.RunDir(command.experiments / xid / name)
    run.note_state(("DONE", "RUNNING", "FAILED", "REQUEUED")[wid % 4], step=3)
  argv = [sys.executable, "launch.py", "status", str(command.experiments / xid)]
  assert "2500 DONE" in runs_within(5.0, argv, project)


# A launcher that is stopped or killed while it submits


def launched(command, *argv):
  """A launcher in a process of its own; returns its exit code and words."""
  argv = [sys.executable, "launch.py", "--main=fake.train", *argv]
  argv += [f"--config={command.config}:tiny", f"--experiments_dir={command.experiments}"]
  done = subprocess.run(
    argv, cwd=command.project, capture_output=True, text=True, preexec_fn=hear_signals
  )
  return done.returncode, done.stdout + done.stderr


STOPPING = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPPING, ids=lambda n: n.name)
def test_launcher_stopped_before_its_record_leaves_nothing(command, cluster, number):
  cluster.fault("signal-at-sbatch-1", text=str(int(number)))
  assert launched(command)[0] == 130
  (array,) = cluster.arrays()
  assert cluster.states(array.xid) == ["CANCELLED"] * 2
  assert not list(command.experiments.glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPPING, ids=lambda n: n.name)
def test_launcher_stopped_while_it_submits_takes_all_back(command, cluster, number):
  cluster.fault("signal-at-sbatch-2", text=str(int(number)))
  code, said = launched(command, "--then_eval=sample")
  assert code == 130
  assert "nothing is submitted. To go on: ./launch.py rerun" in said
  first, second = cluster.arrays()
  assert cluster.states(first.xid) + cluster.states(second.xid) == ["CANCELLED"] * 4
  assert status(command, first.xid)[:2] == ["PENDING"] * 2
  assert command.out.count("not submitted: rerun does that") == 4
  assert command("rerun", first.xid) == 0
  cluster.wait()
  assert command("status", first.xid) == 0
  assert "4 DONE" in command.out


def test_launcher_stopped_before_its_first_array_is_noted(command, cluster, monkeypatch):
  def attended(experiment):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(launchers.Experiment, "attended", attended)
    assert command.launch(config=f"{command.config}:tiny") == 130
  (array,) = cluster.arrays()
  assert cluster.states(array.xid) == ["CANCELLED"] * 2
  assert status(command, array.xid) == ["PENDING"] * 2
  assert command("rerun", array.xid) == 0
  cluster.wait()
  assert status(command, array.xid) == ["DONE"] * 2


@pytest.mark.slow
def test_a_stop_during_the_release_is_too_late(command, cluster):
  cluster.fault("signal-at-release", text=str(int(signal.SIGTERM)))
  code, said = launched(command)
  assert code == 0, said
  assert "Submitted 2 jobs" in said
  cluster.wait()
  assert status(command, cluster.arrays()[0].xid) == ["DONE"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("at", ["signal-at-sbatch-2", "signal-at-release"])
def test_launcher_killed_before_the_release_is_shown_and_goes_on(command, cluster, at):
  cluster.fault(at, text=str(int(signal.SIGKILL)))
  assert launched(command, "--then_eval=sample")[0] == -signal.SIGKILL
  cluster.fault(at, there=False)
  arrays = [array.xid for array in cluster.arrays()]
  shown = status(command, arrays[0])
  assert shown[:2] == ["PENDING"] * 2
  assert "JobHeldUser" in command.out
  known = arrays if at == "signal-at-release" else arrays[:1]
  advice = f"To let them start: scontrol release {','.join(known)}"
  assert advice in command.out
  assert command("rerun", arrays[0]) == 1
  assert advice in command.out
  assert len(cluster.arrays()) == 2
  fake_slurm.scontrol(["release", ",".join(known)])
  wait_for(lambda: set(cluster.states(arrays[0])) == {"COMPLETED"})
  if at == "signal-at-sbatch-2":
    assert "not submitted" in command.out
    assert command("rerun", arrays[0]) == 0
    fake_slurm.scancel(arrays[1:])
  cluster.wait()
  assert command("status", arrays[0]) == 0
  assert "4 DONE" in command.out


def test_killed_launchers_held_array_is_known_without_a_note(command, cluster):
  xid = submit(command, "--sargs=--hold")
  (command.experiments / xid / "submitted.jsonl").unlink()
  assert status(command, xid) == ["PENDING"] * 4
  assert f"scontrol release {xid}" in command.out
  assert command("cancel", xid) == 0
  assert cluster.states(xid) == ["CANCELLED"] * 4


# Failures, and what follows


@pytest.mark.slow
def test_failing_setting_is_failed_and_rerun_alone(command, cluster, tmp_path):
  needed = tmp_path / "needed"
  xid = submit(command, f"--config.needs={needed}")
  cluster.wait()
  assert status(command, xid) == ["DONE", "FAILED", "DONE", "DONE"]
  assert cluster.states(xid)[1] == "FAILED"
  assert "FileNotFoundError: needs" in command.out
  assert "Traceback" in command.run(xid, 1).read_state()["traceback"]
  needed.touch()
  assert command("rerun", xid, "--states=FAILED") == 0
  assert cluster.arrays()[-1].job()["array"] == "1"
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 4
  assert command("rerun", xid) == 0
  assert "Nothing to rerun" in command.out


@pytest.mark.slow
def test_refused_rerun_leaves_states_and_reasons(command, cluster, tmp_path):
  needed = tmp_path / "needed"
  xid = submit(command, f"--config.needs={needed}")
  cluster.wait()
  cluster.fault("sbatch-refuses-2")
  assert command("rerun", xid) == 1
  assert "accounting policy" in command.err
  assert status(command, xid) == ["DONE", "FAILED", "DONE", "DONE"]
  assert "FileNotFoundError: needs" in command.out
  needed.touch()
  assert command("rerun", xid) == 0
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 4


@pytest.mark.slow
def test_a_task_that_is_about_to_end_is_not_submitted_twice(command, cluster, project, tmp_path):
  """Its own record is final, and its supervisor has still to write another."""
  file = project / "fake" / "train.py"
  slow = "  run.write_state('FAILED', reason='because')\n"
  slow += "  while not os.path.exists(config['needs']): time.sleep(0.01)\n  sys.exit(1)\n"
  file.write_text(file.read_text().replace("  run.write_environment()\n", slow))
  needed = tmp_path / "go"
  xid = submit(command, f"--config.needs={needed}", config=f"{command.config}:tiny")
  wait_for(lambda: all(command.run(xid, w).read_state()["state"] == "FAILED" for w in range(2)))
  assert status(command, xid) == ["FAILED"] * 2
  assert command("rerun", xid) == 1
  assert "is FAILED, and not over: Slurm's task" in command.out
  assert len(cluster.arrays()) == 1
  needed.touch()
  cluster.wait()
  assert command("rerun", xid) == 0
  assert "Submitted 2 jobs" in command.out
  cluster.wait()


def test_task_that_does_not_come_to_its_log_shows_slurms(command, cluster, monkeypatch):
  template = slurm_template.TEMPLATE.replace("exec {command}", "no-such-module; exit 3; {command}")
  monkeypatch.setattr(slurm_template, "TEMPLATE", template)
  xid = submit(command, config=f"{command.config}:tiny")
  cluster.wait()
  assert status(command, xid) == ["FAILED"] * 2
  log = command.experiments / xid / "logs" / f"{xid}_1.txt"
  assert str(log) in command.out
  assert "no-such-module" in log.read_text()


@pytest.mark.slow
def test_evaluations_follow_task_by_task(command, cluster, tmp_path):
  needed = tmp_path / "needed"
  argv = ["--then_eval=sample", f"--config.needs={needed}"]
  xid = submit(command, *argv)
  _, evaluation = cluster.arrays()
  assert evaluation.job()["dependency"] == f"aftercorr:{xid}"
  assert evaluation.job()["kill-on-invalid-dep"] == "yes"
  cluster.wait()
  assert command("status", xid) == 0
  assert "1 CANCELLED, 6 DONE, 1 FAILED" in command.out
  assert "not started: wid=1" in command.out
  evaluated = json.loads((command.run(xid, 0).path / "eval-sample" / "facts.json").read_text())
  trained = json.loads((command.run(xid, 0).path / "facts.json").read_text())
  assert evaluated["time"] > trained["time"]
  needed.touch()
  assert command("rerun", xid) == 0
  assert [a.job()["array"] for a in cluster.arrays()[2:]] == ["1", "1"]
  assert cluster.arrays()[3].job()["dependency"] == f"aftercorr:{cluster.arrays()[2].xid}"
  cluster.wait()
  assert command("status", xid) == 0
  assert "8 DONE" in command.out


def waiting(command, cluster, tmp_path, *argv):
  """Two running tasks that wait for the file `go` or a signal; returns the experiment's id."""
  argv = ["--config.mode=wait", f"--config.needs={tmp_path / 'go'}", *argv]
  xid = submit(command, *argv, config=f"{command.config}:tiny")
  wait_for(lambda: all("step" in command.run(xid, wid).read_state() for wid in range(2)))
  return xid


@pytest.fixture
def listens(project):
  """The fake trainer stops at USR2, too, and saves checkpoints as real ones are named."""
  file = project / "fake" / "train.py"
  text = file.read_text()
  handler = "signal.signal(signal.SIGTERM, lambda n, f: stop.append(n))"
  text = text.replace(handler, f"{handler}\n{handler.replace('TERM', 'USR2')}")
  text = text.replace(
    "saved.write_text(str(step))",
    "saved.write_text(str(step)); (run.checkpoints_dir / f'step-{step:08d}').mkdir("
    "parents=True, exist_ok=True)",
  )
  assert "SIGUSR2" in text
  file.write_text(text)


@pytest.mark.slow
def test_time_limit_requeues_the_task_which_goes_on(command, cluster, tmp_path, listens):
  xid = waiting(command, cluster, tmp_path)
  cluster.fault("requeue-delay")
  fake_slurm.send(xid, 1, signal.SIGUSR2)
  wait_for(lambda: fake_slurm.Array(xid).read(1)["state"] == "PENDING")
  assert status(command, xid) == ["RUNNING", "REQUEUED"]
  assert "BeginTime" in command.out
  assert command("rerun", xid) == 1
  assert "Nothing to rerun" in command.out
  (tmp_path / "go").touch()
  cluster.fault("requeue-delay", there=False)
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 2
  state = command.run(xid, 1).read_state()
  assert (state["attempt"], state["requeues"], state["restart"]) == (2, 1, 1)
  assert len(cluster.arrays()) == 1


@pytest.mark.slow
def test_requeue_is_tried_again_while_the_controller_is_busy(command, cluster, tmp_path, listens):
  cluster.fault("requeue-busy")
  xid = waiting(command, cluster, tmp_path)
  fake_slurm.send(xid, 0, signal.SIGUSR2)
  wait_for(lambda: command.run(xid, 0).read_state().get("attempt") == 2)
  assert not (cluster.state / "requeue-busy").exists()
  (tmp_path / "go").touch()
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 2


def catches(pid, number):
  """Whether a process has a handler for a signal."""
  text = pathlib.Path(f"/proc/{pid}/status").read_text()
  caught = next(line.split()[1] for line in text.splitlines() if line.startswith("SigCgt"))
  return bool(int(caught, 16) & 1 << (number - 1))


@pytest.mark.slow
def test_a_time_limit_before_the_task_has_started_requeues_it(command, cluster, tmp_path):
  cluster.fault("nothing-starts")
  xid = submit(command, config=f"{command.config}:tiny")
  cluster.fault("nothing-starts", there=False)
  cluster.fault("requeue-delay")
  with runs.holding(command.run(xid, 0).lock_file, "The former attempt"):
    fake_slurm._start(cluster.arrays()[0])
    wait_for(lambda: cluster.states(xid)[0] == "RUNNING")
    wait_for(lambda: catches(fake_slurm.Array(xid).read(0)["pid"], signal.SIGUSR2))
    fake_slurm.send(xid, 0, signal.SIGUSR2)
  wait_for(lambda: fake_slurm.Array(xid).read(0)["state"] == "PENDING")
  assert command.run(xid, 0).read_state()["requeues"] == 1
  cluster.fault("requeue-delay", there=False)
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 2


# What srun does with these two signals.
SRUN = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda n, f: sys.exit(137))
signal.signal(signal.SIGUSR2, lambda n, f: sys.exit(75))
print("listens", flush=True)
time.sleep(60)
"""


def test_workers_are_asked_to_stop_by_a_signal_that_srun_hands_on(
  command, cluster, project, monkeypatch
):
  file = project / "fake" / "configs" / "base.py"
  group = 'config.train_eval_config = ml_collections.ConfigDict({"strategy": "multi_worker"})'
  file.write_text(file.read_text().replace("  config.needs", f"  {group}\n  config.needs"))
  srun = cluster.state.parent / "bin" / "srun"
  srun.write_text(f"#!{sys.executable}\n{SRUN}")
  srun.chmod(0o755)
  values = "export SLURM_NTASKS=2 'SLURM_TASKS_PER_NODE=1(x2)' 'SLURM_JOB_NODELIST=n[1-2]'"
  template = slurm_template.TEMPLATE.replace("exec", f"{values}\nexec")
  monkeypatch.setattr(slurm_template, "TEMPLATE", template)
  xid = submit(command, config=f"{command.config}:tiny")
  run = command.run(xid, 0)
  wait_for(lambda: run.log_file.exists() and "listens" in run.log_file.read_text())
  assert "srun --ntasks=2" in run.log_file.read_text()
  fake_slurm.send(xid, 0, signal.SIGTERM)
  wait_for(lambda: run.read_state()["state"] != "RUNNING")
  state = run.read_state()
  assert (state["state"], state["exit_code"]) == ("REQUEUED", 75)
  assert "stopped by Slurm" in state["reason"]


@pytest.mark.slow
def test_preempted_task_saves_and_does_not_requeue_itself(command, cluster, tmp_path, listens):
  xid = waiting(command, cluster, tmp_path)
  fake_slurm.requeue(xid, 0)
  wait_for(lambda: command.run(xid, 0).read_state().get("attempt") == 2)
  (tmp_path / "go").touch()
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 2
  assert "requeues" not in command.run(xid, 0).read_state()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["refused", "missing"])
def test_task_that_cannot_be_requeued_is_timeout_and_rerun(
  command, cluster, tmp_path, monkeypatch, listens, how
):
  if how == "refused":
    cluster.fault("no-requeue")
  monkeypatch.setenv("PATH", str(tmp_path / "cluster" / "bin"))
  xid = waiting(command, cluster, tmp_path)
  if how == "missing":
    (tmp_path / "cluster" / "bin" / "scontrol").rename(tmp_path / "scontrol")
  fake_slurm.send(xid, 0, signal.SIGUSR2)
  wait_for(lambda: command.run(xid, 0).read_state()["state"] == "TIMEOUT")
  reason = command.run(xid, 0).read_state()["reason"]
  assert ("presently disabled" if how == "refused" else "no 'scontrol'") in reason
  if how == "missing":
    (tmp_path / "scontrol").rename(tmp_path / "cluster" / "bin" / "scontrol")
  (tmp_path / "go").touch()
  cluster.wait()
  assert status(command, xid) == ["TIMEOUT", "DONE"]
  assert command("rerun", xid) == 0
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 2


@pytest.mark.slow
def test_restarts_without_a_newer_checkpoint_end(command, cluster, tmp_path, listens, project):
  xid = waiting(command, cluster, tmp_path)
  text = (command.experiments / xid / "source" / "fake" / "train.py").read_text()
  back = "    step = step if os.path.exists(config['needs']) else 1\n"
  stuck = text.replace("    while mode ==", f"{back}    while mode ==")
  assert stuck != text
  (command.experiments / xid / "source" / "fake" / "train.py").write_text(stuck)
  for attempt in range(1, 4):
    wait_for(lambda n=attempt: command.run(xid, 0).read_state().get("attempt") == n)
    wait_for(lambda: "pid" in command.run(xid, 0).read_state())
    fake_slurm.send(xid, 0, signal.SIGUSR2)
  wait_for(lambda: command.run(xid, 0).read_state()["state"] == "FAILED")
  assert "no progress" in command.run(xid, 0).read_state()["reason"]
  (tmp_path / "go").touch()
  cluster.wait()
  assert command.run(xid, 0).read_state()["attempt"] == 3
  assert command("rerun", xid) == 0  # It counts anew.
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 2


@pytest.mark.slow
def test_number_of_requeues_is_limited(command, cluster, tmp_path, listens, monkeypatch):
  monkeypatch.setattr(slurm_template, "MAX_REQUEUES", 0)
  xid = waiting(command, cluster, tmp_path)
  fake_slurm.send(xid, 0, signal.SIGUSR2)
  wait_for(lambda: command.run(xid, 0).read_state()["state"] == "TIMEOUT")
  assert "MAX_REQUEUES" in command.run(xid, 0).read_state()["reason"]


@pytest.mark.slow
def test_cancel_stops_what_runs_and_what_waits(command, cluster, tmp_path):
  xid = submit(command, "--config.mode=wait", f"--config.needs={tmp_path / 'go'}", "--jobs=2")
  wait_for(lambda: sum("step" in command.run(xid, w).read_state() for w in range(4)) == 2)
  assert command("cancel", xid) == 0
  fates = [line.split(" ", 1)[1] for line in command.out.splitlines()]
  assert set(fates[:2]) <= {"is asked to save its state and stop", "is CANCELLED"}
  assert fates[2:] == ["was PENDING, is CANCELLED"] * 2
  cluster.wait()
  assert cluster.states(xid)[2:] == ["CANCELLED"] * 2
  assert status(command, xid) == ["CANCELLED"] * 4
  assert (command.run(xid, 0).path / "saved").exists()
  assert command("cancel", xid) == 0
  assert command.out.count("already") == 4
  assert command("rerun", xid) == 1
  (tmp_path / "go").touch()
  assert command("rerun", xid, "--states=CANCELLED", "--wids=0-1") == 0
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 2 + ["CANCELLED"] * 2


SITE = ("TRAIN", "ITINF", "SLURM", "RESULTS", "REPORTS", "DATA_CACHE", "SHARED", "DATA")


@pytest.mark.slow
def test_jobs_use_the_folders_of_the_project_and_not_of_the_snapshot(command, cluster, monkeypatch):
  for name in SITE:
    monkeypatch.delenv(f"NTC_{name}_DIR", raising=False)
  assert launched(command, "--then_eval=sample")[0] == 0
  cluster.wait()
  run = command.run(cluster.arrays()[0].xid, 0)
  env = json.loads((run.path / "facts.json").read_text())["env"]
  assert env["NTC_RESULTS_DIR"] == str(command.project / "json_results")
  assert env["NTC_DATA_CACHE_DIR"] == str(command.project / "data_cache")
  assert env["NTC_DATA_DIR"] == str(command.project.parent / "shared" / "data")
  argv = [sys.executable, "launch_eval.py", f"--workdirs={run.path}", "--dataset=sample"]
  argv += ["--use_snapshot", "--args=--skip_existing=false"]
  monkeypatch.setenv("NTC_RESULTS_DIR", str(command.project / "others"))
  subprocess.run(argv, cwd=command.project, check=True)
  monkeypatch.delenv("NTC_RESULTS_DIR")
  cluster.wait()
  facts = json.loads((run.path / "eval-sample" / "facts.json").read_text())
  assert facts["cwd"] == str(run.path.parent / "source")
  assert facts["env"]["NTC_RESULTS_DIR"] == str(command.project / "others")


@pytest.mark.slow
def test_rerun_by_another_executor_leaves_the_others_to_slurm(command, cluster):
  cluster.fault("nothing-starts")
  xid = submit(command, config=f"{command.config}:tiny")
  fake_slurm.scancel([f"{xid}_1"])
  rerun = ("rerun", xid, "--executor=local")
  assert command(*rerun, "--states=CANCELLED", "--wids=1") == 0
  assert status(command, xid) == ["PENDING", "DONE"]
  assert "Slurm: Priority" in command.out
  assert command(*rerun) == 1
  assert "Nothing to rerun" in command.out
  assert command("rerun", xid, "--executor=slurm") == 1
  assert len(cluster.arrays()) == 1
  experiment = launchers.find_experiment(xid, command.experiments)
  assert experiment.record["executor"]["name"] == "local"
  assert slurm._max_requeues(experiment) == slurm_template.MAX_REQUEUES
  assert command("cancel", xid) == 0
  assert "wid=0-rd_lambda=0.08-seed=0 was PENDING, is CANCELLED" in command.out
  assert cluster.states(xid)[0] == "CANCELLED"
  assert status(command, xid) == ["CANCELLED", "DONE"]


@pytest.mark.slow
def test_misspelt_data_set_stops_before_anything_is_submitted(command, cluster, tmp_path):
  for more in ([], ["--dry_run"], ["--test_only"], ["--deep_check=false"]):
    assert command.launch("--then_eval=kodk", *more) == 2
    assert "'kodk'" in command.err
    assert "kodak" in command.err
  assert command.launch(f"--then_eval={tmp_path / 'nowhere'}") == 2
  assert "nowhere" in command.err
  assert "--deep_check=false" in command.err
  assert cluster.arrays() == []
  assert not command.experiments.exists()
  submit(command, f"--then_eval={tmp_path / 'nowhere'}", "--deep_check=false")
  cluster.wait()


@pytest.mark.slow
def test_launch_eval_is_one_array_and_an_experiment_of_its_own(command, cluster, capsys, project):
  xid = submit(command, config=f"{command.config}:tiny")
  cluster.wait()
  argv = [f"--workdirs={command.experiments}/{xid}/wid=*", "--dataset=sample"]
  assert launch_eval.main(argv, project) == 0
  capsys.readouterr()
  assert cluster.arrays()[-1].job()["array"] == "0-1"
  evaluation = launchers.find_experiment(cluster.arrays()[-1].xid)
  cluster.wait()
  assert [launchers.observe(job.folder)["state"] for job in evaluation.jobs()] == ["DONE"] * 2
  facts = json.loads((command.run(xid, 1).path / "eval-sample" / "facts.json").read_text())
  assert facts["cwd"] == str(evaluation.source)
  assert command("status", str(evaluation.path)) == 0
  assert "2 DONE" in command.out


@pytest.mark.slow
@pytest.mark.parametrize("by", ["launch_eval", "then_eval"])
def test_waiting_evaluations_are_not_started_again(command, cluster, capsys, project, by):
  more = ["--then_eval=sample"] if by == "then_eval" else []
  if by == "then_eval":
    cluster.fault("nothing-starts")
  xid = submit(command, *more, config=f"{command.config}:tiny")
  cluster.wait() if by == "launch_eval" else None
  argv = [f"--workdirs={command.experiments}/{xid}/wid=*", "--dataset=sample"]
  holder = cluster.arrays()[0].xid
  if by == "launch_eval":
    cluster.fault("nothing-starts")
    assert launch_eval.main(argv, project) == 0
    holder = cluster.arrays()[-1].xid
  count = len(cluster.arrays())
  capsys.readouterr()
  for executor in ("slurm", "local"):
    assert launch_eval.main([*argv, f"--executor={executor}"], project) == 2
    said = capsys.readouterr().err
    assert f"experiment {holder}" in said
    assert "./launch.py cancel" in said
  assert len(cluster.arrays()) == count


def test_evaluations_may_be_restarted_without_a_checkpoint(tmp_path):
  before = {"restart": 2, "started_from": "", "idle_restarts": 1}
  run = runs.RunDir(tmp_path)
  assert slurm._Requeues(run, 3, "1_0", saves=False).start(before)[1] is None
  assert "no progress" in slurm._Requeues(run, 3, "1_0").start(before)[1]


# Status


def record(state, **facts):
  return {"state": state, **facts}


OLD, NEW = 1e6, 1.0


@pytest.mark.parametrize(
  ("own", "answer", "misses", "age", "state"),
  [
    ("DONE", ("FAILED", ""), 0, OLD, "DONE"),  # Own records first.
    ("FAILED", ("COMPLETED", ""), 0, OLD, "FAILED"),
    ("RUNNING", ("RUNNING", ""), 0, OLD, "RUNNING"),
    ("RUNNING", None, 2, NEW, "RUNNING"),
    ("RUNNING", None, 1, OLD, "RUNNING"),
    ("RUNNING", None, 0, OLD, "RUNNING"),  # Slurm could not be asked.
    ("RUNNING", None, 2, OLD, "LOST"),
    ("RUNNING", ("PENDING", "BeginTime"), 0, NEW, "RUNNING"),
    ("RUNNING", ("PENDING", "BeginTime"), 0, OLD, "REQUEUED"),
    ("RUNNING", ("TIMEOUT", ""), 0, OLD, "TIMEOUT"),
    ("RUNNING", ("TIMEOUT", ""), 0, NEW, "RUNNING"),
    ("RUNNING", ("NODE_FAIL", ""), 0, OLD, "LOST"),
    ("RUNNING", ("OUT_OF_MEMORY", ""), 0, OLD, "FAILED"),
    ("RUNNING", ("COMPLETED", ""), 0, OLD, "FAILED"),
    ("PENDING", ("PENDING", "Resources"), 0, OLD, "PENDING"),
    ("PENDING", ("PENDING", "DependencyNeverSatisfied"), 0, NEW, "CANCELLED"),
    ("PENDING", ("FAILED", "0:53"), 0, NEW, "FAILED"),
    ("PENDING", ("COMPLETED", ""), 0, NEW, "PENDING"),
    ("PENDING", None, 2, NEW, "PENDING"),
    ("PENDING", None, 2, OLD, "LOST"),
    ("REQUEUED", ("PENDING", "BeginTime"), 0, OLD, "REQUEUED"),
    ("REQUEUED", ("CANCELLED", ""), 0, NEW, "CANCELLED"),
    ("REQUEUED", ("TIMEOUT", ""), 0, NEW, "TIMEOUT"),
  ],
)
def test_state_from_own_record_and_slurms_answer(own, answer, misses, age, state):
  assert slurm.judge(record(own), answer, misses, age)["state"] == state


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["squeue-empty", "squeue-fails"])
def test_a_silent_squeue_is_no_failure_of_the_job(command, cluster, tmp_path, fault):
  xid = waiting(command, cluster, tmp_path)
  cluster.fault(fault)
  assert status(command, xid) == ["RUNNING"] * 2
  if fault == "squeue-fails":
    assert "Unable to contact slurm controller" in command.out
    assert command("rerun", xid) == 2
    assert "Unable to contact" in command.err
  (tmp_path / "go").touch()
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 2


@pytest.mark.parametrize("fault", [None, "scontrol-fails", "forgotten"])
def test_waiting_task_is_not_lost_because_squeue_is_silent(command, cluster, fault, monkeypatch):
  cluster.fault("nothing-starts")
  xid = submit(command)
  cluster.fault("squeue-empty")
  if fault is not None:
    cluster.fault(fault)
  monkeypatch.setattr(slurm, "STALE_SECONDS", 0.0)
  assert status(command, xid) == (["LOST"] if fault == "forgotten" else ["PENDING"]) * 4


def test_indices_that_scontrol_means():
  for spec, indices in (("3", [3]), ("1-3%2", [1, 2, 3]), ("0-8:4,9", [0, 4, 8, 9]), ("", [])):
    assert [i for i in range(20) if slurm._is_among(i, spec)] == indices
  assert slurm._is_among(4000, "0,2,4,...")
  assert not slurm._is_among(1, "0,2,4")


@pytest.mark.slow
def test_lagging_squeue_does_not_hide_an_end(command, cluster, tmp_path):
  xid = waiting(command, cluster, tmp_path)
  cluster.fault("squeue-lag")
  assert status(command, xid) == ["RUNNING"] * 2
  (tmp_path / "go").touch()
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 2


@pytest.mark.slow
def test_killed_task_is_lost_and_rerun(command, cluster, tmp_path):
  xid = waiting(command, cluster, tmp_path)
  cluster.fault("squeue-empty")
  os.killpg(fake_slurm.Array(xid).read(0)["pid"], signal.SIGKILL)
  wait_for(lambda: cluster.states(xid)[0] == "FAILED")
  assert status(command, xid) == ["LOST", "RUNNING"]
  (tmp_path / "go").touch()
  cluster.wait()
  cluster.fault("squeue-empty", there=False)
  assert status(command, xid) == ["FAILED", "DONE"]  # Slurm's word is known again.
  assert command("rerun", xid) == 0
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("empty", [False, True])
def test_sacct_is_asked_where_squeue_has_forgotten(command, cluster, tmp_path, empty):
  xid = waiting(command, cluster, tmp_path)
  os.killpg(fake_slurm.Array(xid).read(0)["pid"], signal.SIGKILL)
  wait_for(lambda: cluster.states(xid)[0] == "FAILED")
  for name in ("squeue-empty", "sacct", *(["sacct-empty"] if empty else [])):
    cluster.fault(name)
  assert status(command, xid) == ["LOST" if empty else "FAILED", "RUNNING"]
  (tmp_path / "go").touch()
  cluster.wait()


def test_job_of_another_machine_without_a_heartbeat_is_lost(tmp_path):
  job = runs.RunDir(tmp_path)
  job.write_state("RUNNING", host="elsewhere", supervisor_pid=1)
  job.supervisor_lock_file.touch()
  assert launchers.observe(job)["state"] == "RUNNING"
  old = time.time() - 2 * launchers.STALE_SECONDS
  runs.write_json(job.state_file, {**job.read_state(), "time": old})
  assert launchers.observe(job)["state"] == "RUNNING"
  os.utime(job.supervisor_lock_file, (old, old))
  assert launchers.observe(job)["state"] == "LOST"


def test_heartbeat_of_another_machines_task(tmp_path):
  job = launchers.Job("a", (), runs.RunDir(tmp_path), tmp_path, {})
  job.folder.write_state("RUNNING", host="elsewhere")
  job.folder.supervisor_lock_file.touch()
  view = slurm.View({"a": "1_0"})
  view.misses["1_0"] = 2
  state = {**job.folder.read_state(), "time": 0.0}
  runs.write_json(job.folder.state_file, state)
  assert view.judged(job)["state"] == "RUNNING"
  old = time.time() - 2 * slurm.STALE_SECONDS
  os.utime(job.folder.supervisor_lock_file, (old, old))
  assert view.judged(job)["state"] == "LOST"


@pytest.mark.slow
def test_watch_ends_with_the_last_job(command, cluster, tmp_path):
  xid = waiting(command, cluster, tmp_path)
  argv = [sys.executable, "launch.py", "status", xid, "--watch", "--every=0.1"]
  argv.append(f"--experiments_dir={command.experiments}")
  process = subprocess.Popen(argv, cwd=command.project, stdout=subprocess.PIPE, text=True)
  while "2 RUNNING" not in process.stdout.readline():
    pass
  (tmp_path / "go").touch()
  out, _ = process.communicate(timeout=30)
  assert process.returncode == 0
  assert "2 DONE" in out
  cluster.wait()


# The template


def test_the_shipped_template_is_whole():
  text = slurm.fill(slurm_template.TEMPLATE, dict.fromkeys(slurm.FIELDS, "VALUE"))
  assert text.count("VALUE") == len(slurm.FIELDS)
  for option in ("--requeue", "--open-mode=append", "--signal=B:USR2@"):
    assert f"#SBATCH {option}" in text


@pytest.mark.parametrize(
  ("template", "says"),
  [
    (slurm_template.TEMPLATE.replace("{array}", "{aray}"), ["{aray}", "{array}", "{command}"]),
    (slurm_template.TEMPLATE.replace("{log_file}", "x"), ["missing field {log_file}"]),
  ],
)
def test_unknown_and_missing_fields_are_named(command, cluster, monkeypatch, template, says):
  monkeypatch.setattr(slurm_template, "TEMPLATE", template)
  assert command.launch() == 2
  for part in says:
    assert part in command.err
  assert cluster.arrays() == []


@pytest.mark.parametrize("part", ["#SBATCH --requeue", "#SBATCH --signal=B:USR2@120", "exec "])
def test_template_without_a_needed_line_is_warned_of(command, cluster, monkeypatch, part):
  cluster.fault("nothing-starts")
  submit(command)
  assert "slurm_template.py" not in command.err
  template = slurm_template.TEMPLATE.replace(part, "#" + part if part[0] == "#" else "")
  monkeypatch.setattr(slurm_template, "TEMPLATE", template)
  submit(command)
  assert part.split("@")[0] in command.err


def test_shell_variables_in_a_template_are_left_alone():
  template = slurm_template.TEMPLATE + "# ${HOME} { echo; } {a,b}\n"
  text = slurm.fill(template, dict.fromkeys(slurm.FIELDS, ""))
  assert text.endswith("# ${HOME} { echo; } {a,b}\n")


def test_ranges():
  assert slurm.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
  assert slurm.ranges([]) == ""


@pytest.mark.slow
def test_run_directory_that_lost_power_is_made_anew(command, cluster):
  cluster.fault("nothing-starts")
  xid = submit(command)
  before = command.run(xid, 1).read_work_unit()
  for file in (command.run(xid, 1).work_unit_file, command.run(xid, 1).state_file):
    file.write_text("")
  assert status(command, xid) == ["PENDING"] * 4
  cluster.fault("nothing-starts", there=False)
  fake_slurm._start(cluster.arrays()[0])
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 4
  assert command.run(xid, 1).read_work_unit() == before
