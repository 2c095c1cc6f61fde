"""Run directories: whole writes, records that survive kills, locks that name their holder."""

import dataclasses
import errno
import json
import os
import pathlib
import re
import resource
import socket
import subprocess
import sys

import pytest

from common import hyper, runs

ROOT = pathlib.Path(__file__).resolve().parent.parent


def unit(wid=0, lr=0.1, runname="lr=0.1", family="factorized"):
  config = {"lr": lr, "nested": {"sizes": [1, 2]}}
  return hyper.WorkUnit(family, "train", config, wid, {"lr": lr}, runname, "c.py")


@pytest.fixture
def run(tmp_path):
  made = runs.RunDir.of(tmp_path / "it's an experiment", "x1", unit())
  made.create(unit(), "x1")
  return made


# Writing


@pytest.mark.parametrize("fault", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, fault):
  path = tmp_path / "record.json"
  runs.write_json(path, {"a": 1})

  def fail(*args):
    raise OSError(28, "No space left on device")

  if fault == "replace":
    monkeypatch.setattr(pathlib.Path, "replace", fail)
    monkeypatch.setattr(os, "replace", fail)
  else:
    monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(OSError, match="No space"):
    runs.write_json(path, {"a": 2})
  assert runs.read_json(path) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_write_that_was_killed_leaves_the_old_file(tmp_path):
  path = tmp_path / "record.json"
  runs.write_json(path, {"a": 1})
  code = (
    "import os, sys; from common import runs\n"
    "os.fsync = lambda f: os._exit(9)\n"
    "runs.write_json(sys.argv[1], {'a': 2})"
  )
  assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode == 9
  assert runs.read_json(path) == {"a": 1}


def test_atomic_write_makes_parents_and_honours_the_umask(tmp_path):
  path = tmp_path / "a" / "b"
  before = os.umask(0o027)
  try:
    runs.atomic_write(path, b"x")
  finally:
    os.umask(before)
  assert path.read_bytes() == b"x"
  assert path.stat().st_mode & 0o777 == 0o640


def test_nan_is_no_json(tmp_path):
  with pytest.raises(ValueError):
    runs.write_json(tmp_path / "x", {"a": float("nan")})
  assert not (tmp_path / "x").exists()


def test_records_that_cannot_be_read_are_named(tmp_path):
  with pytest.raises(runs.RunError, match="No such record"):
    runs.read_json(tmp_path / "x")
  (tmp_path / "y").write_text("{")
  with pytest.raises(runs.RunError, match=r"y' is not JSON"):
    runs.read_json(tmp_path / "y")


def test_lines_after_a_torn_line_are_whole(tmp_path):
  path = tmp_path / "m.jsonl"
  runs.append_jsonl(path, {"step": 1})
  runs.append_jsonl(path, {"step": 2})
  path.write_bytes(path.read_bytes()[:-4])
  runs.append_jsonl(path, {"step": 3})
  runs.append_jsonl(path, {"step": 4})
  assert runs.read_jsonl(path) == [{"step": 1}, {"step": 3}, {"step": 4}]
  assert runs.read_jsonl(tmp_path / "none") == []


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_torn_one(tmp_path):
  path = tmp_path / "m.jsonl"
  runs.append_jsonl(path, {"step": 1})
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
  try:
    with pytest.raises(OSError, match="File too large"):
      runs.append_jsonl(path, {"step": 2})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert path.read_text() == '{"step": 1}\n'
  runs.append_jsonl(path, {"step": 3})
  assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


# Run directories


def test_create_is_repeatable_and_refuses_another_config(run):
  run.create(unit(), "x1")
  assert run.read_work_unit() == unit()
  assert (run.xid, run.read_state()["state"]) == ("x1", "PENDING")
  with pytest.raises(runs.RunError, match=r"differs in: lr\)"):
    run.create(unit(lr=0.2), "x1")
  other = dataclasses.replace(unit(), config={"lr": 0.1, "nested": {"sizes": [1, 3]}})
  with pytest.raises(runs.RunError, match=r"nested\.sizes"):
    run.create(other, "x1")
  with pytest.raises(runs.RunError, match="family, task"):
    run.create(unit(family="mshyper"), "x1")
  assert run.read_work_unit() == unit()


def test_a_wid_has_one_run(run):
  second = unit(runname="lr=0.2", lr=0.2)
  with pytest.raises(runs.RunError, match="already has a run with wid 0"):
    runs.RunDir.of(run.path.parent.parent, "x1", second).create(second, "x1")


def test_wid_1_is_not_wid_10(run):
  for wid in (10, 1):
    created = runs.RunDir.of(run.path.parent.parent, "x1", unit(wid))
    created.create(unit(wid), "x1")
    assert created.read_work_unit().wid == wid


@pytest.mark.parametrize("xid", ["", "..", "a/b", "a b"])
def test_xids_are_one_path_component(tmp_path, xid):
  with pytest.raises(runs.RunError, match="--xid"):
    runs.RunDir.of(tmp_path, xid, unit())


def test_open_says_what_is_wrong(run, tmp_path):
  assert runs.RunDir.open(run.path) == run
  with pytest.raises(runs.RunError, match="No run directory"):
    runs.RunDir.open(tmp_path / "none")
  with pytest.raises(runs.RunError, match=r"experiment with the runs wid=0-lr=0\.1"):
    runs.RunDir.open(run.path.parent)


def test_records_of_another_version_are_refused(run):
  record = json.loads(run.work_unit_file.read_text())
  run.work_unit_file.write_text(json.dumps({**record, "schema_version": 0}))
  with pytest.raises(runs.RunError, match="schema version 0"):
    run.read_work_unit()
  del record["work_unit"]["wid"]
  run.work_unit_file.write_text(json.dumps(record))
  with pytest.raises(hyper.ConfigError, match=r"missing \['wid'\]"):
    run.read_work_unit()


def test_state_keeps_facts_and_drops_reasons_of_other_states(run):
  run.write_state("RUNNING", step=3, num_steps=9)
  run.write_state("FAILED", reason="because", signal="SIGKILL")
  assert run.read_state()["step"] == 3
  run.write_state("PENDING", signal=None)
  assert set(run.read_state()) == {"state", "step", "num_steps", "time"}
  with pytest.raises(ValueError, match="Known: PENDING"):
    run.write_state("DOEN")


def test_state_of_a_bare_folder(tmp_path):
  job = runs.RunDir(tmp_path / "eval-kodak")
  assert job.read_state() == {}
  job.write_state("RUNNING", step=1)
  assert job.read_state()["step"] == 1
  job.state_file.write_text("torn")
  assert job.read_state() == {}


def test_new_xids_differ(tmp_path):
  xids = {runs.new_xid(tmp_path / "made") for _ in range(2)}
  assert len(xids) == 2
  assert all(re.fullmatch(r"\d{14}", xid) for xid in xids)


def test_find_runs_orders_by_wid_and_takes_experiments(run, tmp_path):
  for wid in (10, 2):
    runs.RunDir.of(run.path.parent.parent, "x1", unit(wid)).create(unit(wid), "x1")
  for pattern in (run.path.parent / "wid=*", run.path.parent, run.path.parent.parent):
    assert [r.read_work_unit().wid for r in runs.find_runs(str(pattern))] == [0, 2, 10]
  with pytest.raises(runs.RunError, match="No run directory matches"):
    runs.find_runs(str(tmp_path / "none*"))


# Locks


def hold(path):
  """A process that holds a lock until its standard input closes."""
  code = (
    "import sys; from common import runs\n"
    "with runs.holding(sys.argv[1], 'It'):\n"
    "  print('held', flush=True); sys.stdin.read()"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code, str(path)],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  return process


def test_a_second_process_is_refused_and_the_first_is_named(run):
  process = hold(run.lock_file)
  holder = f"process {process.pid} on {socket.gethostname()}"
  with pytest.raises(runs.RunError, match=re.escape(holder)) as e, run.locked():
    pass
  assert str(run.path) in str(e.value)
  assert runs.lock_holder(run.lock_file).startswith(holder)
  process.kill()  # A killed process holds nothing.
  process.wait()
  assert runs.lock_holder(run.lock_file) is None
  with run.locked():
    assert runs.lock_holder(run.lock_file).startswith(f"process {os.getpid()} ")
  assert runs.lock_holder(run.lock_file) is None


def test_looking_at_a_lock_does_not_take_it(run):
  assert runs.lock_holder(run.lock_file) is None
  assert not run.lock_file.exists()
  with run.locked():
    runs.lock_holder(run.lock_file)
    runs.lock_holder(run.lock_file)


def test_file_system_without_locks_is_named_with_the_fix(run, monkeypatch):
  def flock(*args):
    raise OSError(errno.ENOSYS, "Function not implemented")

  run.lock_file.touch()
  monkeypatch.setattr("fcntl.flock", flock)
  with pytest.raises(runs.RunError, match="flock"), run.locked():
    pass
  with pytest.raises(runs.RunError, match="flock"):
    runs.lock_holder(run.lock_file)


def test_lock_is_let_go_after_an_exception(run):
  with pytest.raises(KeyError), run.locked():
    raise KeyError
  with run.locked():
    pass


# Environment


def test_commit_of_a_snapshot_comes_from_the_launcher(monkeypatch, tmp_path):
  monkeypatch.setenv("NTC_COMMIT", "abc")
  for text, dirty in (("1", True), ("0", False), ("", None)):
    monkeypatch.setenv("NTC_DIRTY", text)
    assert runs.git_state(tmp_path) == {"commit": "abc", "dirty": dirty}
  monkeypatch.setenv("NTC_COMMIT", "")
  assert runs.git_state(tmp_path)["commit"] is None
  assert runs.git_state(tmp_path, recorded=False) == {"commit": None, "dirty": None}


def test_environment_has_a_record_a_start(run, monkeypatch):
  monkeypatch.setenv("NTC_COMMIT", "abc")
  run.write_environment()
  run.write_environment()
  history = runs.read_json(run.environment_file)
  assert len(history) == 2
  assert history[1]["commit"] == "abc"
  assert "ml_collections" in {name.replace("-", "_") for name in history[1]["packages"]}
  assert history[1]["host"] == socket.gethostname()


def test_git_state_of_a_checkout(tmp_path):
  git = ["git", "-c", "user.name=n", "-c", "user.email=e@e", "-C", str(tmp_path)]
  subprocess.run([*git, "init", "-q"], check=True)
  (tmp_path / "a").touch()
  assert runs.git_state(tmp_path, recorded=False) == {"commit": None, "dirty": True}
  subprocess.run([*git, "add", "a"], check=True)
  subprocess.run([*git, "commit", "-qm", "a"], check=True)
  state = runs.git_state(tmp_path, recorded=False)
  assert re.fullmatch("[0-9a-f]{40}", state["commit"])
  assert state["dirty"] is False


def test_of_two_packages_of_one_name_the_environment_has_the_one_that_is_imported(
  tmp_path, monkeypatch
):
  for folder, version in (("a", "26.9"), ("b", "26.10")):
    info = tmp_path / folder / f"double-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: double\nVersion: {version}\n\nName: not this\n"
    (info / "METADATA").write_text(text)
  for order, expected in ((("a", "b"), "26.9"), (("b", "a"), "26.10")):
    with monkeypatch.context() as patch:
      for folder in reversed(order):
        patch.syspath_prepend(str(tmp_path / folder))
      assert runs.environment()["packages"]["double"] == expected
