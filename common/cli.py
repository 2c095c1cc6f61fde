"""The command lines of the entry points: train, itinf and eval of every family.

Nothing here imports TensorFlow before the command line has been checked.
"""

import contextlib
import gc
import logging
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Callable, Optional, Union

from absl import flags as absl_flags

import configs
from common import flags, hyper, runs
from common.job import Interrupted, Job

_LOG = logging.getLogger(__name__)

# What an entry point gives: checks a config by building its codec, and runs the job. What the check
# returns is the job's `checked`.
RunJob = Callable[[Job], Any]
CheckUnit = Callable[[hyper.WorkUnit], Any]


def process_start() -> float:
  """time.time() at which this process started (Linux; elsewhere about now)."""
  try:
    fields = pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    boot = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    return time.time() - boot + int(fields[19]) / os.sysconf("SC_CLK_TCK")
  except (OSError, IndexError, ValueError):
    return time.time()


def main(
  family: str,
  task: str,
  run_job: RunJob,
  check: CheckUnit,
  argv: Optional[Sequence[str]] = None,
) -> None:
  """Runs `python -m <family>.<task>` and exits.

  Args:
    family: The entropy-model folder.
    task: "train" or "itinf".
    run_job: The loop.
    check: Raises ValueError, TypeError or RuntimeError for a work unit that cannot run; called
      before anything is written.
    argv: Arguments; default sys.argv[1:].

  Exit codes: 0 done; 1 failed, state FAILED with the reason; 2 the command line or config is
  wrong, nothing was written; 75 asked to stop, state saved.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  with contextlib.ExitStack() as starting:
    starting.enter_context(no_collection())
    sys.exit(_main(family, task, run_job, check, arguments, starting.close))


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
  """Within, no garbage is collected: imports and tracing make objects by the million that stay.

  To look through them again and again takes a second of a training's start, of ten.
  """
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was_enabled:
      gc.enable()


def _main(
  family: str,
  task: str,
  run_job: RunJob,
  check: CheckUnit,
  argv: list[str],
  on_started: Callable[[], None],
) -> int:
  began = process_start()
  try:
    values, config_file, overrides = flags.parse(argv, _define_flags(task), _usage(family, task))
    if values.check_units is not None:
      return _check_units(values.check_units, check, on_started)
    unit, run = _resolve(family, task, values, config_file, overrides)
    if run is not None and run.read_state().get("state") == "DONE":
      run.create(unit, run.path.parent.name)  # Says so if another config lies there.
      print(f"{run.path} is DONE already. For another run choose another --xid.")
      return 0
    # What the run starts from is recorded as it was named: the experiment may be moved.
    full = runs.with_source(unit, run, _source_seconds())
    set_up_process(run)
    distribution = _start_devices(unit, run) if task == "train" else None
    checked = check(full)
    if run is None:
      run = runs.RunDir.of(values.experiments_dir, runs.new_xid(values.experiments_dir), unit)
    if distribution is None or distribution.is_chief:
      run.create(unit, run.path.parent.name)
  except (flags.UsageError, ValueError, TypeError, RuntimeError, OSError) as e:
    print(f"Error: {e}", file=sys.stderr)
    return 2
  job = Job(full, run, began, distribution, checked, on_started)
  del checked  # The job is to be the last that holds it.
  job.handle_signals()
  if distribution is not None and not distribution.is_chief:
    return _run_as_helper(job, run_job)
  try:
    with run.locked(), logging_to(run):
      return _run_locked(job, run_job)
  except runs.RunError as e:  # Another process holds the lock: the state is not ours to touch.
    print(f"Error: {e}", file=sys.stderr)
    return 2
  except OSError as e:  # Neither the lock nor the log can be written.
    print(
      f"Error: {run.path} cannot be written ({e.strerror or e}). What was saved stays. Make room "
      "or permit it, and start this command again.",
      file=sys.stderr,
    )
    return 1


# A launcher waits for its sweep's check; what is left after this many seconds is checked when run.
_CHECK_SECONDS = 20.0


def _check_units(path: str, check: CheckUnit, on_started: Callable[[], None]) -> int:
  """Checks the work units recorded in a JSON file, for launchers. Writes nothing."""
  units = [hyper.WorkUnit.from_json(record) for record in runs.read_json(path)]
  set_up_process()
  began = time.monotonic()
  for count, unit in enumerate(units):
    if time.monotonic() - began > _CHECK_SECONDS:
      print(f"Checked {count} of {len(units)} settings; the others are checked when they start.")
      break
    try:
      check(unit)
    except (ValueError, TypeError, RuntimeError, OSError) as e:
      print(f"Error: wid {unit.wid}: {e}", file=sys.stderr)
      return 2
    on_started()
  return 0


# On Slurm a task starts when another has ended, whose record may be seen so much later.
_SOURCE_SECONDS = 60.0


def _source_seconds() -> float:
  return _SOURCE_SECONDS if "SLURM_JOB_ID" in os.environ and "NTC_SUPERVISED" in os.environ else 0.0


def _start_devices(unit: hyper.WorkUnit, run: Optional[runs.RunDir]) -> Any:
  from common import distribution

  worker = distribution.this_worker(unit.config)
  if worker.count > 1 and run is None:
    raise flags.UsageError("Several workers need one run directory: give --workdir, or --xid.")
  devices = distribution.start(unit.config)
  if devices.num_replicas > 1:
    print(f"Worker {worker.index}: {devices}", file=sys.stderr, flush=True)
  return devices


def _run_as_helper(job: Job, run_job: RunJob) -> int:
  """Works for the chief, which writes the files, holds the lock and records the end."""
  index = job.distribution.worker.index if job.distribution else 0
  with logging_to(level=logging.WARNING):
    try:
      run_job(job)
    except Interrupted:
      return runs.EXIT_RESUME
    except KeyboardInterrupt:
      return 130
    except Exception as e:
      expected = isinstance(e, OSError) or type(e).__module__.startswith("common.")
      _LOG.error("Worker %d: %s: %s", index, type(e).__name__, e, exc_info=not expected)
      return 1
  return 0


def _run_locked(job: Job, run_job: RunJob) -> int:
  run, unit = job.run, job.unit
  again = f"python -m {unit.family}.{unit.task} --workdir '{run.path}'"
  try:
    run.write_environment()
    job.running(num_steps=int(job.config.train_eval_config.num_steps))
    _LOG.info("Run directory: %s", run.path)
    run_job(job)
  except Interrupted as e:
    _end(run, "REQUEUED", step=e.step, reason="asked to stop; the state is saved")
    _LOG.info("%s Go on with: %s", e, again)
    return runs.EXIT_RESUME
  except KeyboardInterrupt:
    _end(run, "CANCELLED", reason="interrupted")
    return 130
  except Exception as e:
    _end(run, "FAILED", reason=f"{type(e).__name__}: {e}"[:2000])
    # Errors of our own and of the system say what is wrong; others need their traceback.
    expected = isinstance(e, OSError) or type(e).__module__.startswith("common.")
    _LOG.error("%s: %s", type(e).__name__, e, exc_info=not expected)
    _LOG.error("What was saved stays. After the fix: %s", again)
    return 1
  _LOG.info("Done: %s", run.path)
  return 0


def _end(run: runs.RunDir, state: str, **facts: Any) -> None:
  """Records the end of a run as far as the disk lets us: the error itself must not get lost."""
  try:
    run.write_state(state, **facts)
  except OSError as e:
    _LOG.error("The state %s could not be written: %s", state, e)


def set_up_process(run: Optional[runs.RunDir] = None) -> None:
  """TensorFlow's threads, quiet logs, GPU memory as it is needed.

  NTC_NUM_THREADS threads, else as many as the run's first start had under a launcher: another
  number sums in another order, and a resumed run should end with the weights of an unbroken one.
  """
  with no_collection():
    import tensorflow as tf
    import tensorflow_compression  # noqa: F401 (every codec needs it)

  tf.get_logger().setLevel("ERROR")
  recorded = run.read_state().get("num_threads", "") if run is not None else ""
  threads = os.environ.get("NTC_NUM_THREADS") or str(recorded or "")
  if threads:
    if not threads.isdigit() or int(threads) < 1:
      raise flags.UsageError(f"NTC_NUM_THREADS={threads!r} must be a whole number of 1 or more.")
    tf.config.threading.set_intra_op_parallelism_threads(int(threads))
    tf.config.threading.set_inter_op_parallelism_threads(max(1, int(threads)))
  for gpu in tf.config.list_physical_devices("GPU"):
    tf.config.experimental.set_memory_growth(gpu, True)


class _AboveProgress(logging.StreamHandler):
  """Writes to standard error, above a progress bar that may be there."""

  def emit(self, record: logging.LogRecord) -> None:
    """See `logging.Handler`."""
    from tqdm import tqdm

    tqdm.write(self.format(record), file=self.stream)
    self.flush()


@contextlib.contextmanager
def logging_to(run: Optional[runs.RunDir] = None, level: int = logging.INFO) -> Iterator[None]:
  """Logs to standard error and, outside of a supervisor, to the run's log file."""
  root = logging.getLogger()
  before, level_before = list(root.handlers), root.level
  form = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%Y-%m-%d %H:%M:%S")
  handlers: list[logging.Handler] = [_AboveProgress()]
  # Under a supervisor standard error is the log file already.
  if run is not None and not os.environ.get("NTC_SUPERVISED"):
    handlers.append(logging.FileHandler(run.log_file))
  root.setLevel(level)
  root.handlers[:] = handlers
  for handler in handlers:
    handler.setFormatter(form)
  try:
    yield
  finally:
    root.setLevel(level_before)
    root.handlers[:] = before
    for handler in handlers:
      handler.close()


def _define_flags(task: str) -> Callable[[absl_flags.FlagValues], None]:
  def define(values: absl_flags.FlagValues) -> None:
    default = configs.ITINF_DIR if task == "itinf" else configs.TRAIN_DIR
    absl_flags.DEFINE_string(
      "config", None, "Config file, or FILE:VARIANT such as bls2017.py:tiny.", flag_values=values
    )
    absl_flags.DEFINE_integer(
      "wid", None, "Run this setting of the config's sweep (0, 1, ...). Default: the config as it "
      "stands, as wid 0.", flag_values=values,
    )  # fmt: skip
    absl_flags.DEFINE_string(
      "xid", None, "Experiment id. Default: the time. With the same --xid a run is resumed.",
      flag_values=values,
    )  # fmt: skip
    absl_flags.DEFINE_string(
      "experiments_dir", str(default), "Where experiments lie.", flag_values=values
    )
    absl_flags.DEFINE_string(
      "workdir", None, "Start or resume the run that is recorded in this directory; then no "
      "--config.", flag_values=values,
    )  # fmt: skip
    absl_flags.DEFINE_string(
      "check_units", None, "For launchers: check the work units in this JSON file, write nothing.",
      flag_values=values,
    )  # fmt: skip

  return define


def _usage(family: str, task: str) -> str:
  verb = "Trains one run" if task == "train" else "Optimises the latents of a data set's images"
  return (
    f"{verb} of the family {family!r}.\n\n"
    f"  python -m {family}.{task} --config {family}/configs/FILE.py[:tiny] "
    "[--wid N] [--config.key=value ...]\n"
    f"  python -m {family}.{task} --workdir RUN_DIR      (resume)"
  )


def _resolve(
  family: str,
  task: str,
  values: absl_flags.FlagValues,
  config_file: Optional[hyper.ConfigFile],
  overrides: dict[str, Any],
) -> tuple[hyper.WorkUnit, Optional[runs.RunDir]]:
  """The work unit and its directory; None where the experiment's id is still to be claimed."""
  if values.workdir is not None:
    if config_file is not None or values.wid is not None or values.xid is not None:
      raise flags.UsageError(
        "--workdir holds the run's config: it goes without --config, --wid and --xid."
      )
    run = runs.RunDir.open(values.workdir)
    unit = run.read_work_unit()
    if (unit.family, unit.task) != (family, task):
      raise flags.UsageError(
        f"{values.workdir} is a run of {unit.family}.{unit.task}: "
        f"python -m {unit.family}.{unit.task} --workdir ..."
      )
    return unit, run
  if config_file is None:
    raise flags.UsageError(
      f"Name a config (--config {family}/configs/FILE.py) or a run (--workdir DIR); see --help."
    )
  unit = hyper.make_work_unit(config_file, family, task, values.wid, overrides)
  if values.xid is None:
    return unit, None
  return unit, runs.RunDir.of(values.experiments_dir, values.xid, unit)


def eval_main(
  family: str, evaluate: Callable[..., Any], argv: Optional[Sequence[str]] = None
) -> None:
  """Evaluates a run and exits: 0 done, 1 failed, 2 the command line or config is wrong.

  `evaluate` is called with the arguments of `eval_lib.evaluate`.
  """
  sys.exit(_eval_main(family, evaluate, list(sys.argv[1:] if argv is None else argv)))


def _define_eval_flags(values: absl_flags.FlagValues) -> None:
  text, boolean = absl_flags.DEFINE_string, absl_flags.DEFINE_bool
  text("workdir", None, "The run to evaluate.", flag_values=values)
  text("dataset", None, "A name in configs.py, a folder, a glob or an image.", flag_values=values)
  absl_flags.DEFINE_enum(
    "mode", "bitstream", ["bitstream", "estimated"], "Measure files, or estimate their size.",
    flag_values=values,
  )  # fmt: skip
  text("step", None, "Evaluate this checkpoint, or 'best'; default the newest.", flag_values=values)
  text("results_dir", str(configs.RESULTS_DIR), "Where results go.", flag_values=values)
  boolean("skip_existing", True, "Leave existing results of the same pictures.", flag_values=values)
  boolean("lpips", True, "Measure LPIPS too, where there are weights.", flag_values=values)
  text("save_dir", None, "Write decoded pictures and files here.", flag_values=values)
  boolean(
    "save_pictures", False, "Write decoded pictures and files beside the results, where reports "
    "look for them.", flag_values=values,
  )  # fmt: skip
  text("job_dir", None, "Where a launcher reads this job's state.", flag_values=values)
  boolean("check_args", False, "For launchers: read the command line only.", flag_values=values)
  boolean(
    "profile", False, "Measure FLOPs per pixel, parameters and seconds of the model's stages; "
    "print them, and with --dataset put them into the results file. On a machine that is busy "
    "(launch_eval.py --jobs) seconds mean little.", flag_values=values,
  )  # fmt: skip
  text(
    "profile_size", None, "Profile with a picture of this size, HxW (height x width). Default: of "
    "the data set's picture with the median number of pixels; without --dataset 512x768.",
    flag_values=values,
  )  # fmt: skip
  text(
    "config", None, "With --profile, without --workdir: measure this config's untrained model.",
    flag_values=values,
  )  # fmt: skip


def _eval_usage(family: str) -> str:
  run = "train_xms/<xid>/wid=<N>-<runname>"
  return (
    f"Measures a run of the family {family!r} on a data set, in bytes of real files.\n\n"
    f"  python -m {family}.eval --workdir {run} --dataset kodak [--profile]\n"
    f"  python -m {family}.eval --profile --workdir {run}\n"
    f"  python -m {family}.eval --profile --config {family}/configs/FILE.py "
    "[--config.key=value ...]"
  )


def _eval_main(family: str, evaluate: Callable[..., Any], argv: list[str]) -> int:
  values = None
  try:
    values, config_file, overrides = flags.parse(argv, _define_eval_flags, _eval_usage(family))
    if values.check_args:
      return 0
    size = _profile_size(values)
    run: Union[runs.RunDir, hyper.WorkUnit]
    if config_file is not None:
      run = _unit_to_profile(family, values, config_file, overrides)
    else:
      run = _run_to_evaluate(family, values)
    set_up_process()
    if values.dataset is not None:
      from common import data

      data.resolve(values.dataset)
  except (flags.UsageError, ValueError, runs.RunError) as e:
    print(f"Error: {e}", file=sys.stderr)
    if values is not None and values.job_dir:
      _end(_job_dir(values.job_dir), "FAILED", reason=str(e)[:2000])
    return 2
  with logging_to():
    return _evaluate(values, run, size, evaluate)


def _profile_size(values: absl_flags.FlagValues) -> Optional[tuple[int, int]]:
  """--profile_size as (height, width)."""
  text = values.profile_size
  if text is None:
    return None
  if not values.profile:
    raise flags.UsageError("--profile_size goes with --profile.")
  match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
  if match is None:
    raise flags.UsageError(
      f"--profile_size={text}: needs HxW, height and width in pixels: --profile_size=512x768."
    )
  return int(match.group(1)), int(match.group(2))


def _unit_to_profile(
  family: str,
  values: absl_flags.FlagValues,
  config_file: hyper.ConfigFile,
  overrides: dict[str, Any],
) -> hyper.WorkUnit:
  if not values.profile:
    raise flags.UsageError("--config is for --profile; an evaluation needs --workdir.")
  if values.workdir is not None:
    raise flags.UsageError("--workdir holds the run's config: it goes without --config.")
  for name in sorted(values):
    if values[name].present and name not in ("profile", "profile_size", "alsologtostderr"):
      raise flags.UsageError(
        f"--{name} needs a trained run: --workdir instead of --config. An untrained model is only "
        "profiled; --profile_size sets the picture's size."
      )
  return hyper.make_work_unit(config_file, family, "train", overrides=overrides)


def _run_to_evaluate(family: str, values: absl_flags.FlagValues) -> runs.RunDir:
  if values.workdir is None:
    also = " (or --config, for the profile of an untrained model)" if values.profile else ""
    raise flags.UsageError(f"--workdir is needed{also}; see --help.")
  if values.dataset is None:
    if not values.profile:
      raise flags.UsageError("--dataset is needed, or --profile; see --help.")
    if values.save_dir is not None or values.save_pictures:
      raise flags.UsageError(
        "--save_dir and --save_pictures need --dataset: a profile writes none."
      )
  if values.save_dir is not None and values.save_pictures:
    raise flags.UsageError("--save_dir or --save_pictures, not both.")
  run = runs.RunDir.open(values.workdir)
  unit = run.read_work_unit()
  if unit.family != family or unit.task != "train":
    raise flags.UsageError(
      f"{values.workdir} is a run of {unit.family}.{unit.task}"
      + (f": python -m {unit.family}.eval" if unit.task == "train" else "; name a training run.")
    )
  return run


def _evaluate(
  values: absl_flags.FlagValues,
  run: Union[runs.RunDir, hyper.WorkUnit],
  profile_size: Optional[tuple[int, int]],
  evaluate: Callable[..., Any],
) -> int:
  job_dir = _job_dir(values.job_dir) if values.job_dir else None
  if job_dir is not None:
    job_dir.write_state("RUNNING", pid=os.getpid())
  try:
    path = evaluate(
      run=run,
      dataset=values.dataset,
      mode=values.mode,
      step=values.step,
      results_dir=values.results_dir,
      skip_existing=values.skip_existing,
      save_dir=values.save_dir,
      save_pictures=values.save_pictures,
      job_dir=job_dir,
      profile=values.profile,
      profile_size=profile_size,
      lpips=values.lpips,
    )
  except KeyboardInterrupt:
    if job_dir is not None:
      _end(job_dir, "CANCELLED", reason="interrupted")
    return 130
  except Exception as e:
    expected = isinstance(e, OSError) or type(e).__module__.startswith("common.")
    _LOG.error("Error: %s: %s", type(e).__name__, e, exc_info=not expected)
    if job_dir is not None:
      _end(job_dir, "FAILED", reason=f"{type(e).__name__}: {e}"[:2000])
    return 2 if isinstance(e, hyper.ConfigError) and isinstance(run, hyper.WorkUnit) else 1
  if job_dir is not None:
    _end(job_dir, "DONE", **({} if path is None else {"result": str(path)}))
  if path is not None:
    print(path)
  return 0


def _job_dir(path: str) -> runs.RunDir:
  return runs.RunDir(pathlib.Path(path).absolute())
