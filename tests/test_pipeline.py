"""The whole walk, as people run it: sweep -> evaluation -> classical codec -> report."""

import os
import subprocess
import sys

import pytest

from common import datasets, results, runs
from tests.conftest import ROOT, tiny_arguments


def _run(environment, *argv):
  done = subprocess.run(
    [sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
  return done.stdout


@pytest.mark.slow
def test_from_config_to_report(pictures, tmp_path):
  environment = {
    **os.environ,
    "NTC_TRAIN_DIR": str(tmp_path / "train_xms"),
    "NTC_RESULTS_DIR": str(tmp_path / "json results"),
    "NTC_REPORTS_DIR": str(tmp_path / "reports"),
  }
  config = tiny_arguments(pictures, tmp_path / "train_xms")
  _run(environment, "launch.py", "--main=factorized.train", *config, "--jobs=2", "--xid=sweep")
  experiment = tmp_path / "train_xms" / "sweep"
  found = runs.find_runs(str(experiment / "wid=*"))
  lambdas = [r.read_work_unit().config["model_config"]["rd_lambda"] for r in found]
  assert lambdas == [0.04, 0.016, 0.0063, 0.0025]
  assert all(r.read_state()["state"] == "DONE" for r in found)
  assert (experiment / "source" / "factorized" / "train.py").is_file()

  dataset = str(pictures)
  workdirs = f"--workdirs={experiment}/wid=*"
  _run(environment, "launch_eval.py", workdirs, f"--dataset={dataset}", "--jobs=2")
  _run(environment, "-m", "common.classical", f"--dataset={dataset}", "--codec=jpeg",
       "--qualities=20,50,80,95")  # fmt: skip
  files = [
    results.read(p) for p in results.find(tmp_path / "json results", datasets.label(dataset))
  ]
  assert len(files) == 8 and len({f.dataset["hash"] for f in files}) == 1
  curves = results.curves(files)
  assert sorted(len(c.bpp) for c in curves) == [4, 4]

  output = _run(environment, "-m", "common.report", f"--dataset={dataset}")
  page = tmp_path / "reports" / datasets.label(dataset) / "index.html"
  assert str(page) in output
  text = page.read_text()
  assert "factorized bls2017 sweep" in text and "JPEG 4:2:0" in text
