#!/usr/bin/env python3
"""Runs a config's sweep: every setting of get_hyper() becomes a run directory and a job.

usage:
  ./launch.py --main factorized.train --config factorized/configs/bls2017.py[:tiny]
              [--config.a.b=value ...] [--jobs N] [--args '...'] [--dry_run]
  ./launch.py status XID
  ./launch.py rerun XID [--states FAILED,LOST] [--wids 3,7-9]
  ./launch.py cancel XID

The experiment goes to <experiments_dir>/<xid>/: its record, a snapshot of the source (jobs and
reruns run that, whatever is edited meanwhile), and a folder a run with its config, state and log.
Ctrl-C asks the running jobs to save their state and stop; `rerun XID` goes on from there.
XID may also be the experiment's path. A single run needs no launcher: python -m <family>.train
"""

import shlex
import socket
import sys
from collections.abc import Sequence
from typing import Any, Optional

from common import venv

if __name__ == "__main__":
  venv.use_project_venv(__file__)

import pathlib

from absl import flags as absl_flags

import configs
from common import datasets, flags, hyper, launchers, runs

# The launcher decides these for each task.
_RESERVED_ARGS = ("workdir", "job_dir", "wid", "xid", "config")

# What tasks take as folders.
_FOLDER_ARGS = ("experiments_dir", "results_dir", "save_dir")


def main(argv: Sequence[str], project_dir: pathlib.Path = configs.PROJECT_DIR) -> int:
  """The command line without the program's name; returns the exit code.

  0: all is well (after a launch: every job is DONE). 1: some job is not. 2: the command is wrong.
  75: stopped, and `rerun` goes on. 130: interrupted before any job was started.
  """
  commands = {"status": _status, "rerun": _rerun, "cancel": _cancel}
  try:
    if argv and argv[0] in commands:
      return commands[argv[0]](list(argv[1:]))
    if argv and not argv[0].startswith("-"):
      raise flags.UsageError(
        f"Unknown command {argv[0]!r}. Known: {', '.join(commands)}; to launch: --main, --config."
      )
    return _launch(list(argv), project_dir)
  except KeyboardInterrupt:  # While jobs run, `launchers.wait` sees to it.
    print("Interrupted.", file=sys.stderr)
    return 130
  except (flags.UsageError, hyper.ConfigError, launchers.LaunchError, runs.RunError, OSError) as e:
    print(f"Error: {e}", file=sys.stderr)
    return 2


def _define_launch(values: absl_flags.FlagValues) -> None:
  absl_flags.DEFINE_string("main", None, "What to run, <family>.<task>: factorized.train",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("args", "", "Further arguments for every task, as one quoted text.",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_bool("dry_run", False, "Print the settings; write and start nothing.",
                         flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("xid", None, "The experiment's id; without it the time as digits.",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("then_eval", None, "Evaluate each run on this data set once trained.",
                           flag_values=values)  # fmt: skip
  define_experiments_dir(values)
  define_executor(values)


def define_experiments_dir(values: absl_flags.FlagValues) -> None:
  """The flag that says where experiments live."""
  absl_flags.DEFINE_string(
    "experiments_dir", None,
    "Where experiments live, instead of TRAIN_DIR or ITINF_DIR in configs.py.",
    flag_values=values,
  )  # fmt: skip


def define_executor(values: absl_flags.FlagValues) -> None:
  """The flags that say where and how jobs run."""
  absl_flags.DEFINE_string("executor", "local", "Where jobs run: local (this machine).",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_integer("jobs", None, "How many jobs run at once. (default: 1)",
                            flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("gpus", None, "GPUs for the jobs in turn, one a job: 0,1",
                           flag_values=values)  # fmt: skip


def executor_from(
  values: absl_flags.FlagValues, recorded: Optional[dict[str, Any]] = None
) -> launchers.Executor:
  """The executor that the flags, and where they are silent the experiment's record, ask for."""
  recorded = recorded or {}
  jobs = values.jobs if values.jobs is not None else recorded.get("jobs", 1)
  gpus = recorded.get("gpus", []) if values.gpus is None else _listed(values.gpus)
  return launchers.make_executor(values.executor, jobs, gpus)


def _listed(text: str) -> list[str]:
  return [part.strip() for part in text.split(",") if part.strip()]


def split_args(text: str, reserved: Sequence[str]) -> list[str]:
  """`--args` as a list; folders in it become absolute, for the jobs run elsewhere.

  Raises:
    flags.UsageError: Quotes do not match, or a flag is one that the launcher sets itself.
  """
  try:
    args = shlex.split(text)
  except ValueError as e:
    raise flags.UsageError(f"--args {text!r}: {e}.") from e
  for arg in args:
    name = arg.lstrip("-").split("=", 1)[0].split(".", 1)[0]
    if arg.startswith("-") and name in reserved:
      raise flags.UsageError(f"--args: {arg!r} is set by the launcher; give it without --args.")
  for i, arg in enumerate(args):
    name, equals, value = arg.partition("=")
    if not arg.startswith("-") or name.lstrip("-") not in _FOLDER_ARGS:
      continue
    if equals and value:
      args[i] = f"{name}={_absolute(value)}"
    elif not equals and i + 1 < len(args):
      args[i + 1] = _absolute(args[i + 1])
  return args


def _absolute(folder: str) -> str:
  return str(pathlib.Path(folder).expanduser().absolute())


def _take_experiments_dir(args: list[str], given: Optional[str]) -> Optional[str]:
  """Published commands say `--args '--experiments_dir DIR'`: the launcher takes it out."""
  found = None
  for i, arg in enumerate(args):
    name, equals, value = arg.lstrip("-").partition("=")
    if arg.startswith("-") and name == "experiments_dir":
      if not equals and i + 1 == len(args):
        raise flags.UsageError("--args: --experiments_dir needs a folder.")
      found = value if equals else args[i + 1]
      del args[i : i + (1 if equals else 2)]
      break
  if found and given and found != _absolute(given):
    raise flags.UsageError(f"Two experiments_dir: {given!r}, and in --args {found!r}.")
  return given or found


def _launch(argv: list[str], project_dir: pathlib.Path) -> int:
  values, config_file, overrides = flags.parse(argv, _define_launch, __doc__ or "")
  known = ", ".join(launchers.known_mains(project_dir)) or "none"
  if values.main is None or config_file is None:
    missing = "--main" if values.main is None else "--config"
    raise flags.UsageError(f"{missing} is missing (see --help). Known for --main: {known}.")
  family, _, task = values.main.partition(".")
  if values.main not in launchers.known_mains(project_dir):
    hint = " Evaluations are started by ./launch_eval.py." if task.endswith("eval") else ""
    raise flags.UsageError(f"Unknown --main {values.main!r}. Known: {known}.{hint}")
  if values.then_eval and not (project_dir / family / "eval.py").is_file():
    raise flags.UsageError(f"--then_eval: there is no {family}/eval.py.")
  if values.then_eval and task != "train":
    raise flags.UsageError(f"--then_eval goes with a training, not with {values.main}.")
  args = split_args(values.args, _RESERVED_ARGS)
  chosen = _take_experiments_dir(args, values.experiments_dir)
  default = configs.ITINF_DIR if task == "itinf" else configs.TRAIN_DIR
  experiments_dir = pathlib.Path(_absolute(chosen)) if chosen else default
  executor = executor_from(values)
  units = hyper.expand(config_file, family, task, overrides)
  if values.xid is not None:
    runs.RunDir.of(experiments_dir, values.xid, units[0])
    launchers.Experiment.check_free(experiments_dir / values.xid)
  print(_settings_table(units, overrides))
  where = experiments_dir / (values.xid or "<xid>")
  print(f"\n{len(units)} settings of {config_file.source} for {values.main}, to {where}")
  if values.dry_run:
    print("Dry run: nothing was written; values are checked at launch.")
    return 0
  print("Checking the settings and their data ...", flush=True)
  then_eval = datasets.absolute(values.then_eval) if values.then_eval else None
  if then_eval is not None:
    launchers.check_dataset(then_eval, project_dir)
  said = launchers.check_units(units, project_dir)
  if said:
    print(said)
  experiment = launchers.Experiment.create(
    experiments_dir,
    units,
    project_dir,
    args=args,
    xid=values.xid,
    then_eval=then_eval,
    facts={
      "command": shlex.join([sys.argv[0], *argv]),
      "argv": argv,
      "cwd": str(pathlib.Path.cwd()),
      "executor": {"name": executor.name, **executor.options()},
    },
  )
  print(f"Experiment {experiment.xid}: {experiment.path}", flush=True)
  with experiment.attended():
    go_on = f"./launch.py rerun {_name(experiment)}"
    return run_jobs(executor, experiment.jobs(), go_on, experiment)


def _settings_table(units: Sequence[hyper.WorkUnit], common: dict[str, Any]) -> str:
  keys = list(dict.fromkeys(key for unit in units for key in unit.overrides if key not in common))
  rows = [
    (unit.wid, *(unit.overrides.get(key, "") for key in keys), unit.runname) for unit in units
  ]
  text = launchers.table(("wid", *keys, "runname"), rows)
  if common:
    text += "\nFor all: " + ", ".join(f"{key}={value!r}" for key, value in common.items())
  return text


def _name(experiment: launchers.Experiment) -> str:
  """The experiment's id where that finds it, else its path; as a shell takes it."""
  if experiment.path.parent in (configs.TRAIN_DIR, configs.ITINF_DIR):
    return experiment.xid
  return shlex.quote(str(experiment.path))


def run_jobs(
  executor: launchers.Executor,
  jobs: Sequence[launchers.Job],
  go_on: str,
  experiment: Optional[launchers.Experiment] = None,
) -> int:
  """Submits jobs, waits for their ends and reports; returns the exit code.

  Args:
    executor: Runs them.
    jobs: Prepared jobs.
    go_on: The command that goes on with what is not DONE.
    experiment: Takes note of the submission.
  """
  options = ", ".join(f"{k}={v}" for k, v in executor.options().items() if v)
  print(f"{len(jobs)} jobs on {socket.gethostname()} ({executor.name}: {options})", flush=True)
  ids = executor.submit(jobs)
  if experiment is not None:
    experiment.note_submission(executor, ids)
  progress = launchers.Progress(jobs, sys.stderr, observe=executor.observe)
  stopped = launchers.wait(executor, progress)
  text, counts = launchers.states_table(jobs, executor.observe)
  print(f"\n{text}\n{_summary(counts)}")
  if set(counts) <= {"DONE"}:
    return 0
  print(f"To go on: {go_on}")
  return runs.EXIT_RESUME if stopped else 1


def _summary(counts: dict[str, int]) -> str:
  return ", ".join(f"{n} {state}" for state, n in sorted(counts.items()))


def _parse_with_xid(argv: list[str], define: Any) -> tuple[launchers.Experiment, Any]:
  xid = None
  if argv and not argv[0].startswith("-"):
    xid = argv.pop(0)
  values, _, _ = flags.parse(argv, define, __doc__ or "", allow_config=False)
  if xid is None:
    raise flags.UsageError("Which experiment? ./launch.py status XID (see --help)")
  return launchers.find_experiment(xid, values.experiments_dir), values


def _status(argv: list[str]) -> int:
  experiment, _ = _parse_with_xid(argv, define_experiments_dir)
  record = experiment.record
  dirty = " with changes, see source.patch" if record["dirty"] else ""
  print(f"{experiment.path}\n{record.get('command', '')}\ncommit {record['commit']}{dirty}\n")
  text, counts = launchers.states_table(experiment.jobs())
  print(f"{text}\n{_summary(counts)}")
  return 0


def _define_rerun(values: absl_flags.FlagValues) -> None:
  absl_flags.DEFINE_string("states", ",".join(launchers.RERUN_STATES), "Which states to run again.",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("wids", None, "Only these: 3,7-9", flag_values=values)
  define_experiments_dir(values)
  define_executor(values)


def _rerun(argv: list[str]) -> int:
  experiment, values = _parse_with_xid(argv, _define_rerun)
  states = [state.upper() for state in _listed(values.states)]
  for state in states:
    if state not in runs.STATES or state in ("DONE", "RUNNING"):
      allowed = [s for s in runs.STATES if s not in ("DONE", "RUNNING")]
      raise flags.UsageError(f"--states: {state!r} cannot be rerun. Known: {', '.join(allowed)}.")
  known = [int(run["wid"]) for run in experiment.record["runs"]]
  wids = set(known) if values.wids is None else parse_wids(values.wids, known)
  if not experiment.source.is_dir():
    raise launchers.LaunchError(f"The source snapshot {experiment.source} is gone: launch anew.")
  executor = executor_from(values, experiment.record.get("executor"))
  with experiment.attended():
    jobs = [job for job in experiment.jobs() if experiment.wid_of(job) in wids]
    seen = {job.name: launchers.observe(job.folder)["state"] for job in jobs}
    chosen = _chosen(jobs, seen, states)
    if not chosen:
      text, counts = launchers.states_table(jobs)
      print(f"{text}\nNothing to rerun among {', '.join(states)}: {_summary(counts)}.")
      return 0 if set(counts) <= {"DONE"} else 1
    launchers.prepare(chosen)
    return run_jobs(executor, chosen, f"./launch.py rerun {_name(experiment)}", experiment)


def _chosen(
  jobs: Sequence[launchers.Job], seen: dict[str, str], states: Sequence[str]
) -> list[launchers.Job]:
  chosen: list[launchers.Job] = []
  for job in jobs:
    if job.after is None:
      wanted = seen[job.name] in states
    elif any(other.name == job.after.name for other in chosen):
      wanted = seen[job.name] not in ("DONE", "RUNNING")
    else:
      wanted = seen[job.after.name] == "DONE" and seen[job.name] in (*states, "CANCELLED")
    if wanted:
      chosen.append(job)
  return chosen


def parse_wids(text: str, known: Sequence[int]) -> set[int]:
  """ "3,7-9" as a set.

  Raises:
    flags.UsageError: It is no such list, or names a work unit that is not there.
  """
  wids: set[int] = set()
  for part in _listed(text):
    first, dash, last = part.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
      raise flags.UsageError(f"--wids={text}: numbers and ranges, like 3,7-9.")
    wids.update(range(int(first), int(last if dash else first) + 1))
  unknown = sorted(wids - set(known))
  if unknown or not wids:
    raise flags.UsageError(
      f"--wids={text}: no work unit {', '.join(map(str, unknown)) or 'is named'}. "
      f"There are {min(known)} to {max(known)}."
    )
  return wids


def _cancel(argv: list[str]) -> int:
  experiment, _ = _parse_with_xid(argv, define_experiments_dir)
  executor = launchers.make_executor(experiment.record["executor"]["name"], jobs=1)
  for name, fate in executor.cancel(experiment.jobs(), experiment.ids()).items():
    print(f"{name} {fate}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
