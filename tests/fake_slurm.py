"""A Slurm of one machine for tests, without daemons: `install` links it as sbatch, squeue, ...

Tasks really run, in processes of their own; a process an array (`_serve`) starts them. All state
lies in $FAKE_SLURM as files. Faults are files there, too:

    squeue-empty, squeue-fails, sacct-empty     what their names say
    squeue-lag                                  squeue shows what it showed first
    sbatch-refuses-N                            the Nth call of sbatch is refused
    foreign-cluster, sbatch-says                sbatch answers "id;other", or writes the file's text
    no-requeue                                  scontrol requeue is refused
    requeue-busy                                the first scontrol requeue is; the fault then goes
    forgotten, scontrol-fails                   scontrol show job knows no job, or nothing at all
    requeue-delay                               a requeued task stays PENDING
    nothing-starts                              released arrays stay PENDING
    never-satisfied-late                        what waits for a failed task stays PENDING
    signal-at-sbatch-N, signal-at-release       the launcher gets the signal that the file names,
                                                after the Nth sbatch, or before the release
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "scancel")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
MAX_ARRAY_SIZE = 1001


def install(folder, max_array_size=MAX_ARRAY_SIZE):
  """Makes `folder`/bin and `folder`/state; returns the variables to set."""
  (folder / "bin").mkdir(parents=True)
  (folder / "state").mkdir()
  for command in COMMANDS:
    script = folder / "bin" / command
    code = f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r}); "
    code += "import fake_slurm; sys.exit(fake_slurm.main(sys.argv[1:]))"  # From its bytecode.
    text = f"exec {shlex.quote(sys.executable)} -S -c {shlex.quote(code)} {command} "
    script.write_text("#!/bin/sh\n" + text + '"$@"\n')
    script.chmod(0o755)
  (folder / "state" / "max_array_size").write_text(str(max_array_size))
  path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
  return {"PATH": path, "FAKE_SLURM": str(folder / "state"), "NTC_EXECUTOR": "slurm"}


def _root():
  return pathlib.Path(os.environ["FAKE_SLURM"])


def _is_faulty(name):
  return (_root() / name).exists()


class Array:
  """One job array: `job.json` as submitted, and a file a task that has left PENDING."""

  def __init__(self, xid):
    self.xid = str(xid)
    self.path = _root() / self.xid

  def job(self):
    return json.loads((self.path / "job.json").read_text())

  def tasks(self):
    indices = []
    for part in self.job()["array"].split("%")[0].split(","):
      first, _, last = part.partition("-")
      indices += range(int(first), int(last or first) + 1)
    return indices

  def read(self, index):
    try:
      return json.loads((self.path / f"task-{index}.json").read_text())
    except FileNotFoundError:
      waits = "Dependency" if "dependency" in self.job() else "Priority"
      return {"state": "PENDING", "reason": "JobHeldUser" if self.is_held() else waits}

  def write(self, index, **facts):
    temporary = self.path / f".task-{index}-{os.getpid()}"
    temporary.write_text(json.dumps(facts))
    temporary.replace(self.path / f"task-{index}.json")

  def is_held(self):
    return (self.path / "held").exists()

  @contextlib.contextmanager
  def locked(self):
    """To be held from reading a task to writing it: commands and `_serve` change it alike."""
    with (self.path / "lock").open("a") as f:
      fcntl.flock(f, fcntl.LOCK_EX)
      yield


def _signal_launcher(name):
  """Waits a moment, too: whether the signal is heeded at once or later must not be luck."""
  if _is_faulty(name):
    os.kill(os.getppid(), int((_root() / name).read_text()))
    time.sleep(0.5)


def _fail(text):
  print(text, file=sys.stderr)
  return 1


def sbatch(argv):
  count = _root() / "sbatch-calls"
  with count.open("a+") as f:
    fcntl.flock(f, fcntl.LOCK_EX)
    f.write("x")
    f.flush()
    number = f.tell()
  if _is_faulty(f"sbatch-refuses-{number}"):
    return _fail("sbatch: error: Batch job submission failed: Job violates accounting policy")
  script = sys.stdin.read()
  lines = [line[len("#SBATCH ") :] for line in script.splitlines() if line.startswith("#SBATCH ")]
  options = {}
  for word in [*(w for line in lines for w in shlex.split(line)), *argv]:
    name, _, value = word.partition("=")
    options[name.lstrip("-")] = value
  limit = int((_root() / "max_array_size").read_text())
  if max(int(n) for n in re.findall(r"\d+", options["array"].split("%")[0])) >= limit:
    return _fail("sbatch: error: Batch job submission failed: Invalid job array specification")
  if "test-only" in options:
    print("sbatch: Job 1 to start at 2030-01-01T00:00:00 using 1 processors", file=sys.stderr)
    return 0
  array = Array(100 + number)
  array.path.mkdir()
  (array.path / "script.sh").write_text(script)
  (array.path / "environment.json").write_text(json.dumps(dict(os.environ)))
  (array.path / "argv.json").write_text(json.dumps(argv))
  (array.path / "job.json").write_text(json.dumps(options))
  if "hold" in options:
    (array.path / "held").touch()
  else:
    _start(array)
  _signal_launcher(f"signal-at-sbatch-{number}")
  if _is_faulty("sbatch-says"):
    print((_root() / "sbatch-says").read_text(), file=sys.stderr)
  print(f"{array.xid};other" if _is_faulty("foreign-cluster") else array.xid)
  return 0


def _start(array):
  if _is_faulty("nothing-starts"):
    return
  log = (array.path / "server.txt").open("ab")
  subprocess.Popen(
    [sys.executable, "-S", __file__, "_serve", array.xid],
    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
  )  # fmt: skip


def _serve(argv):
  """Runs an array's tasks, a few at a time, until all have ended."""
  array = Array(argv[0])
  job = array.job()
  _, _, limit = job["array"].partition("%")
  at_once = min(int(limit or 4), 4)
  how, _, first_task = job.get("dependency", "").partition(":")  # aftercorr:7, or afterok:7_0
  after = Array(first_task.split("_")[0]) if first_task else None
  running = {}
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline:
    with array.locked():
      for index, process in list(running.items()):
        code = process.poll()
        if code is not None:
          del running[index]
          task = array.read(index)
          if task["state"] == "REQUEUE":
            array.write(index, state="PENDING", reason="BeginTime", restarts=task["restarts"] + 1)
          elif task["state"] == "CANCEL":
            array.write(index, state="CANCELLED", reason="None")
          else:
            array.write(index, state="FAILED" if code else "COMPLETED", reason=f"exit {code}")
      left = 0
      for index in array.tasks():
        task = array.read(index)
        if index in running or task["state"] in ENDED:
          continue
        left += 1
        if task["state"] != "PENDING" or len(running) >= at_once:
          continue
        if task["reason"] == "BeginTime" and _is_faulty("requeue-delay"):
          continue
        if after is not None:
          index_there = int(first_task.split("_")[1]) if how == "afterok" else index
          first = after.read(index_there)["state"]
          if first in ENDED and first != "COMPLETED" and not _is_faulty("never-satisfied-late"):
            array.write(index, state="CANCELLED", reason="DependencyNeverSatisfied")
          if first != "COMPLETED":
            continue
        running[index] = _run(array, index, task.get("restarts", 0))
    if not running and not left:
      return 0
    time.sleep(0.05)
  return 1


def _run(array, index, restarts):
  job = array.job()
  env = json.loads((array.path / "environment.json").read_text())
  env.update(
    SLURM_JOB_ID=array.xid if index == array.tasks()[-1] else f"{array.xid}{index}",
    SLURM_ARRAY_JOB_ID=array.xid,
    SLURM_ARRAY_TASK_ID=str(index),
    SLURM_RESTART_COUNT=str(restarts),
    SLURM_CPUS_ON_NODE="1",
  )
  name = job["output"].replace("%A", array.xid).replace("%a", str(index)).replace("%%", "%")
  with pathlib.Path(name).open("ab") as log:
    process = subprocess.Popen(
      ["/bin/bash", str(array.path / "script.sh")], env=env, stdin=subprocess.DEVNULL,
      stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
  array.write(index, state="RUNNING", reason="None", pid=process.pid, restarts=restarts)
  return process


def _all_arrays():
  return [Array(path.name) for path in sorted(_root().iterdir()) if path.name.isdigit()]


def _listed(argv):
  wanted = argv[argv.index("-j") + 1].split(",")
  for array in _all_arrays():
    if array.xid in wanted:
      started = {path.name for path in array.path.glob("task-*.json")}
      pending = array.read(-1)
      for index in array.tasks():
        yield array, index, array.read(index) if f"task-{index}.json" in started else pending


def squeue(argv):
  if _is_faulty("squeue-fails"):
    return _fail("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
  for word in argv[argv.index("-j") + 1].split(","):
    if not word.isdigit():
      return _fail(f"Invalid job id: {word}")
  if _is_faulty("squeue-empty"):
    return 0
  shown = {"REQUEUE": "COMPLETING", "CANCEL": "COMPLETING"}
  text = "".join(
    f"{array.xid}_{index}|{shown.get(task['state'], task['state'])}|{task['reason']}\n"
    for array, index, task in _listed(argv)
  )
  if _is_faulty("squeue-lag"):
    old = _root() / "squeue-lag"
    text = old.read_text() or text
    old.write_text(text)
  print(text, end="")
  return 0


def sacct(argv):
  if not _is_faulty("sacct"):
    return _fail("Slurm accounting storage is disabled")
  if not _is_faulty("sacct-empty"):
    for array, index, task in _listed(argv):
      print(f"{array.xid}_{index}|{task['state']}|0:0")
  return 0


def scontrol(argv):
  if argv == ["show", "config"]:
    limit = (_root() / "max_array_size").read_text()
    print("Configuration data as of now\nClusterName = fake")
    print(f"MaxArraySize            = {limit}\nMaxJobCount = 9")
    return 0
  if argv[0] == "release":
    _signal_launcher("signal-at-release")
    for array in map(Array, argv[1].split(",")):
      (array.path / "held").unlink()
      _start(array)
    return 0
  if argv[0] == "requeue":
    if _is_faulty("no-requeue"):
      return _fail("Requested operation is presently disabled for job")
    if _is_faulty("requeue-busy"):
      (_root() / "requeue-busy").unlink()
      return _fail("slurm_requeue error: Unable to contact slurm controller (connect failure)")
    xid, _, index = argv[1].partition("_")
    requeue(xid, index)
    return 0
  if argv[:2] == ["show", "hostnames"]:
    print("n1\nn2")
    return 0
  if argv[:2] == ["show", "node"]:
    print(f"NodeName={argv[2]} NodeAddr=127.0.0.1")
    return 0
  if argv[:3] == ["-o", "show", "job"]:
    if _is_faulty("scontrol-fails"):
      return _fail("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    if _is_faulty("forgotten"):
      return _fail("slurm_load_jobs error: Invalid job id specified")
    for array, index, task in _listed(["-j", argv[3]]):
      state = f"JobState={task['state']} Reason={task['reason']}"
      print(f"JobId=1 ArrayJobId={array.xid} ArrayTaskId={index} JobName=a b {state}")
    return 0
  return _fail(f"unknown: {argv}")


def requeue(xid, index):
  """Has a running task end by SIGTERM and start again; what preemption does, too."""
  _end(xid, index, "REQUEUE")


def _end(xid, index, state):
  array = Array(xid)
  with array.locked():
    task = array.read(index)
    if task["state"] == "RUNNING":
      array.write(index, **{**task, "state": state})
      with contextlib.suppress(ProcessLookupError):  # It ended with the server that started it.
        os.killpg(task["pid"], signal.SIGTERM)
    elif state == "CANCEL" and task["state"] == "PENDING":
      array.write(index, state="CANCELLED", reason="None")


def send(xid, index, number):
  """A signal to the batch process alone, as --signal=B: does."""
  os.kill(Array(xid).read(index)["pid"], number)


def scancel(argv):
  for word in argv[2:] if argv[0] == "-M" else argv:
    xid, _, spec = word.partition("_")
    array = Array(xid)
    indices = array.tasks()
    if spec:
      parts = [part.split("-") for part in spec.strip("[]").split(",")]
      indices = [i for part in parts for i in range(int(part[0]), int(part[-1]) + 1)]
    for index in indices:
      _end(xid, index, "CANCEL")
  return 0


def main(argv):
  """A command's name and its arguments."""
  commands = (sbatch, squeue, sacct, scontrol, scancel, _serve)
  return {function.__name__: function for function in commands}[argv[0]](argv[1:])


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
