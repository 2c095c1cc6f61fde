"""Seconds that launching takes, on a fake Slurm: `python -m benchmarks.launching`.

A dry run of 1,000 settings and its submission, 100,000 settings expanded and submitted in chunks of
1,001, and the status of 10,000 run directories; each as a process of its own, start-up included.
Goals: 1 s, 2 s, 10 s, 5 s; `--help` and the status of a small sweep 0.5 s. The project and the
experiments lie in a temporary folder; nothing runs. Beside the seconds stand those of the
processor, the fake commands included: on a busy machine they say more. Seconds are medians.
"""

import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import ceilings, rows  # noqa: E402
from common import runs  # noqa: E402
from tests import fake_slurm  # noqa: E402

SWEEP = """
from common import hyper
from mshyper.configs.two_layer_syn import get_config

def get_cfg_str(config):
  return hyper.name_from(config, ["model_config.rd_lambda", "train_eval_config.seed"])

def get_hyper(variant=""):
  rd_lambdas = hyper.sweep("model_config.rd_lambda", [i / 1000 for i in range(1, 11)])
  return hyper.product(rd_lambdas, hyper.sweep("train_eval_config.seed", range({})))
"""


def seconds(
  argv: list[str], folder: pathlib.Path, env: dict[str, str], repeat: int
) -> tuple[list[float], list[float]]:
  """Of `repeat` calls: seconds by the clock, and of the processor."""
  clocks, processor = [], []
  for _ in range(repeat):
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *argv], cwd=folder, env=env, check=True, capture_output=True)
    clocks.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
  return clocks, processor


def check_no_tensorflow(argv: list[str], folder: pathlib.Path, env: dict[str, str]) -> None:
  """Raises if a command imports TensorFlow."""
  argv = [sys.executable, "-X", "importtime", *argv]
  done = subprocess.run(argv, cwd=folder, env=env, check=True, capture_output=True, text=True)
  if " tensorflow" in done.stderr:
    raise SystemExit(f"{' '.join(argv[3:])} imports TensorFlow.")


def main() -> None:
  parser = rows.parser(__doc__)
  parser.add_argument(
    "--settings", type=int, default=100_000, help="of the largest sweep; 0: no more than 1,000"
  )
  parser.add_argument("--repeat", type=int, default=3)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    env = {**os.environ, **fake_slurm.install(folder / "cluster")}
    env["NTC_TRAIN_DIR"] = str(folder / "train_xms")
    env.pop("SLURM_JOB_ID", None)
    (folder / "cluster" / "state" / "nothing-starts").touch()
    project = folder / "project"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*_xms", "data_cache", "slurm_jobs")
    shutil.copytree(ROOT, project, ignore=ignored)

    def launch(settings: int, *more: str) -> list[str]:
      file = folder / f"sweep_of_{settings}.py"
      file.write_text(SWEEP.format(settings // 10))
      return ["launch.py", "--main=mshyper.train", f"--config={file}", *more]

    def report(what: str, argv: list[str], repeat: int = options.repeat) -> list[float]:
      clocks, processor = seconds(argv, project, env, repeat)
      clock, used = statistics.median(clocks), statistics.median(processor)
      print(f"{what:<48}{clock:8.2f} s{used:8.2f} s", flush=True)
      return clocks

    def figure(row: int, what: str, clocks: list[float], goal: float) -> rows.Figure:
      share = statistics.median(clocks) / goal
      return rows.Figure(row, what, clocks, "s", f"{goal:.0f} s", share, 1.0, at_least=False)

    print(f"{'load ' + str(os.getloadavg()[0]):<48}{'clock':>10}{'processor':>10}")
    report("--help", ["launch.py", "--help"])
    check_no_tensorflow(launch(1000, "--dry_run"), project, env)
    dry = report("dry run of 1,000 settings", launch(1000, "--dry_run"))
    calls = folder / "cluster" / "state" / "sbatch-calls"
    before = calls.stat().st_size if calls.exists() else 0  # A byte a call.
    submit = report("1,000 settings submitted (one sbatch)", launch(1000))
    if calls.stat().st_size - before != options.repeat:
      raise SystemExit("1,000 settings take more than one call of sbatch.")
    xid = max(p.name for p in (folder / "train_xms").iterdir())
    report("status of 1,000 waiting runs", ["launch.py", "status", xid])
    figures = [
      figure(10, "no TensorFlow import", dry, 1.0),
      figure(11, "one sbatch, on a fake Slurm", submit, 2.0),
    ]
    if options.settings:
      report(f"{options.settings:,} settings submitted in chunks", launch(options.settings), 1)
      report("10,000 settings submitted in chunks", launch(10_000), 1)
      experiment = max((folder / "train_xms").iterdir(), key=lambda p: int(p.name))
      for run in runs.read_json(experiment / "experiment.json")["runs"]:
        run_dir = runs.RunDir(experiment / f"wid={run['wid']}-{run['runname']}")
        run_dir.path.mkdir()
        state = ("DONE", "RUNNING", "FAILED", "REQUEUED")[run["wid"] % 4]
        run_dir.note_state(state, step=run["wid"])
      report("status of 10,000 run directories", ["launch.py", "status", experiment.name])
  rows.report(figures, ceilings.measure(), options.json)


if __name__ == "__main__":
  main()
