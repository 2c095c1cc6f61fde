"""The supervisor: how a task's end is recorded, and which signals reach it."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from common import runs, supervise

ROOT = pathlib.Path(__file__).resolve().parent.parent


def wait_for(condition, seconds=10.0):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "waited in vain"
    time.sleep(0.01)


def task(code):
  """A task's argv: Python code that has `run` (its RunDir) at hand."""
  prelude = (
    "import os, pathlib, signal, sys, time\n"
    f"sys.path.insert(0, {str(ROOT)!r})\n"
    "from common import runs\n"
    "run = runs.RunDir(pathlib.Path(sys.argv[1]))\n"
  )
  return lambda folder: [sys.executable, "-c", prelude + code, str(folder)]


def start(folder, make_argv):
  command = [sys.executable, "-m", "common.supervise", "--job_dir", str(folder), "--"]
  return subprocess.Popen([*command, *make_argv(folder)], cwd=ROOT)


def run(folder, make_argv):
  return start(folder, make_argv).wait(20), runs.RunDir(folder).read_state()


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "it's a job"
  path.mkdir()
  return path


def test_done_is_the_tasks_own_mark(folder):
  code, state = run(folder, task("print('hello'); run.write_state('DONE', step=7)"))
  assert code == 0
  assert (state["state"], state["step"], state["attempt"]) == ("DONE", 7, 1)
  assert "hello" in (folder / "log.txt").read_text()


def test_exit_0_without_end_mark_is_failed(folder):
  run(folder, task("run.write_state('DONE')"))
  runs.RunDir(folder).write_state("PENDING")
  code, state = run(folder, task("pass"))  # The DONE of the first attempt does not count.
  assert code == 1
  assert state["state"] == "FAILED"
  assert state["reason"] == "exited with 0 without its end mark"
  assert state["attempt"] == 2


def test_exception_is_failed_with_traceback_and_log(folder):
  code, state = run(folder, task("print('before'); {}['no such key']"))
  assert code == 1
  assert (state["state"], state["exit_code"]) == ("FAILED", 1)
  assert state["reason"] == "exited with 1: KeyError: 'no such key'"
  assert state["traceback"].startswith("Traceback (most recent call last)")
  assert "before" in state["log_tail"]


def test_log_tail_holds_the_last_50_lines_of_this_attempt(folder):
  run(folder, task("raise RuntimeError('first attempt')"))
  code, state = run(folder, task("print(*range(200), sep='\\n'); sys.stdout.flush(); sys.exit(3)"))
  assert code == 3
  assert state["log_tail"] == [str(n) for n in range(150, 200)]
  assert "traceback" not in state
  assert "first attempt" in (folder / "log.txt").read_text()


def test_a_job_that_is_done_is_not_started_again(folder):
  runs.RunDir(folder).write_state("DONE", step=3)
  code, state = run(folder, task("run.write_state('RUNNING', step=0)"))
  assert code == 0
  assert (state["state"], state["step"]) == ("DONE", 3)


@pytest.mark.parametrize(
  ("code", "reason"),
  [
    ("run.write_state('FAILED', reason='its own words'); sys.exit(1)", "its own words"),
    ("print('Error: no such flag'); sys.exit(2)", "Error: no such flag"),
    ("sys.exit(2)", "without a word"),
  ],
)
def test_reason_is_the_tasks_own_or_its_last_words(folder, code, reason):
  _, state = run(folder, task(code))
  assert reason in state["reason"]


def test_task_knows_that_it_is_supervised(folder):
  code = "run.write_state('DONE', detail=os.environ['NTC_SUPERVISED'])"
  assert run(folder, task(code))[1]["detail"] == "1"


@pytest.mark.slow
def test_number_of_threads_of_the_first_start_is_kept(folder, monkeypatch):
  code = "run.write_state('DONE', detail=os.environ.get('NTC_NUM_THREADS'))"
  seen = []
  for threads in ("many", "3", "5", None):
    monkeypatch.delenv("NTC_NUM_THREADS", raising=False)
    if threads:
      monkeypatch.setenv("NTC_NUM_THREADS", threads)
    seen.append(run(folder, task(code))[1]["detail"])
    runs.RunDir(folder).write_state("PENDING")
  assert seen == ["many", "3", "3", "3"]


FULL_DISK = """
import os, sys
sys.path.insert(0, {root!r})
from common import runs, supervise
def write_state(run, state, **facts):
  if state in {states}:
    raise OSError(28, "No space left on device")
  write(run, state, **facts)
write, runs.RunDir.write_state = runs.RunDir.write_state, write_state
sys.exit(supervise.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("states", "code", "exit_code", "state"),
  [
    (["FAILED"], "sys.exit(3)", supervise.EXIT_UNRECORDED, "RUNNING"),
    (["FAILED"], "run.write_state('DONE'); sys.exit(3)", supervise.EXIT_UNRECORDED, "DONE"),
    (["FAILED"], "run.write_state('DONE')", 0, "DONE"),
    (["REQUEUED"], "sys.exit(75)", 75, "RUNNING"),
    (["RUNNING"], "run.write_state('DONE')", 1, None),
  ],
)
def test_full_disk_does_not_crash_the_supervisor(folder, capfd, states, code, exit_code, state):
  script = FULL_DISK.format(root=str(ROOT), states=states)
  command = [sys.executable, "-c", script, "--job_dir", str(folder), "--", *task(code)(folder)]
  assert subprocess.run(command, cwd=ROOT).returncode == exit_code
  assert runs.RunDir(folder).read_state().get("state") == state
  err = capfd.readouterr().err
  assert "Traceback" not in err
  assert ("No space left" in err) == (exit_code != 0)


def test_nonzero_exit_after_the_end_mark_is_failed(folder):
  code, state = run(folder, task("run.write_state('DONE'); sys.exit(4)"))
  assert code == 4
  assert (state["state"], state["reason"]) == ("FAILED", "exited with 4 after its end mark")


def test_exit_75_is_requeued(folder):
  code, state = run(folder, task("sys.exit(75)"))
  assert code == 75
  assert state["state"] == "REQUEUED"


def test_a_program_that_is_not_there_is_failed(folder):
  code, state = run(folder, lambda _: ["/no/such program"])
  assert code == 127
  assert state["state"] == "FAILED"
  assert "/no/such program" in state["reason"]


def test_killed_task_names_the_signal(folder):
  code, state = run(folder, task("os.kill(os.getpid(), signal.SIGKILL)"))
  assert code == 128 + signal.SIGKILL
  assert (state["state"], state["signal"]) == ("FAILED", "SIGKILL")
  assert "SIGKILL" in state["reason"]


def test_a_stop_signal_nobody_sent_through_us_is_failed(folder):
  _, state = run(folder, task("os.kill(os.getpid(), signal.SIGTERM)"))
  assert (state["state"], state["signal"]) == ("FAILED", "SIGTERM")


WAITS = """
got = []
for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
  signal.signal(s, lambda n, f: got.append(n))
run.write_state('RUNNING', pid=os.getpid())
while not got:
  time.sleep(0.01)
run.write_state('RUNNING', detail=signal.Signals(got[0]).name)
sys.exit(75)
"""


@pytest.mark.parametrize(
  ("sent", "arrives"),
  [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGUSR2", "SIGUSR2")],
)
def test_signals_are_forwarded(folder, sent, arrives):
  process = start(folder, task(WAITS))
  wait_for(lambda: "pid" in runs.RunDir(folder).read_state())
  process.send_signal(getattr(signal, sent))
  assert process.wait(10) == 75
  state = runs.RunDir(folder).read_state()
  assert (state["state"], state["detail"]) == ("REQUEUED", arrives)


NO_HANDLER = "run.write_state('RUNNING', pid=os.getpid())\nwhile True: time.sleep(1)"


def test_task_that_dies_of_the_forwarded_signal_is_requeued(folder):
  process = start(folder, task(NO_HANDLER))
  wait_for(lambda: "pid" in runs.RunDir(folder).read_state())
  process.terminate()
  assert process.wait(10) == 75
  state = runs.RunDir(folder).read_state()
  assert (state["state"], state["reason"]) == ("REQUEUED", "stopped before it could save")


def test_sigquit_kills_a_task_that_does_not_listen(folder):
  process = start(folder, task("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + NO_HANDLER))
  wait_for(lambda: "pid" in runs.RunDir(folder).read_state())
  process.terminate()
  process.send_signal(signal.SIGQUIT)
  assert process.wait(10) == 128 + signal.SIGKILL
  assert runs.RunDir(folder).read_state()["reason"] == "killed by SIGKILL, as asked"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_task_dies_with_its_supervisor(folder):
  process = start(folder, task(NO_HANDLER))
  wait_for(lambda: "pid" in runs.RunDir(folder).read_state())
  pid = runs.RunDir(folder).read_state()["pid"]
  process.kill()
  process.wait(10)

  def gone():
    try:
      return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
      return True

  wait_for(gone)


def test_cancelled_job_is_not_started(folder):
  (folder / "cancel").touch()
  _, state = run(folder, task("run.write_state('DONE')"))
  assert state["state"] == "CANCELLED"


def test_cancelled_while_running_is_cancelled(folder):
  process = start(folder, task(WAITS))
  wait_for(lambda: "pid" in runs.RunDir(folder).read_state())
  (folder / "cancel").touch()
  process.terminate()
  process.wait(10)
  assert runs.RunDir(folder).read_state()["state"] == "CANCELLED"


@pytest.mark.parametrize("name", ["lock", "supervisor.lock"])
def test_a_job_in_use_is_not_started_and_its_state_is_not_touched(folder, name, capfd):
  job = runs.RunDir(folder)
  job.write_state("RUNNING", step=3)
  before = job.read_state()
  with runs.holding(folder / name, "The run"):
    code, state = run(folder, task("run.write_state('DONE')"))
  assert code == 1
  assert state == before
  assert f"process {os.getpid()} on {socket.gethostname()}" in capfd.readouterr().err


def test_last_traceback_is_the_last_one_with_its_message():
  text = (
    "Traceback (most recent call last):\n  File 'a'\nValueError: first\n\n"
    "During handling of the above exception, another exception occurred:\n\n"
    "Traceback (most recent call last):\n  File 'b'\n    f()\n\nKeyError: 'second'\nbye\n"
  )
  assert supervise.last_traceback(text).splitlines()[-1] == "KeyError: 'second'"
  assert "first" not in supervise.last_traceback(text)
  assert supervise.last_traceback("all is well\n") is None


def test_wrong_usage_is_exit_code_2(capsys):
  assert supervise.main(["--job_dir", "x", "python"]) == 2
  assert "usage" in capsys.readouterr().err
