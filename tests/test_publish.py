"""Results that leave the machine, and the report that is committed."""

import csv
import dataclasses
import io
import json
import pathlib

import numpy as np
import pytest

import configs
from benchmarks import half_hour
from common import bd, hyper, publish, report, report_data, results, runs
from tests.conftest import ROOT
from tests.test_report import BPP, PSNR, result, write_jpeg

COMMITTED = ROOT / "docs" / "report"
DATASETS = ("kodak", "cid22-valid")


@pytest.fixture
def site(tmp_path, monkeypatch):
  """Experiments, results and pictures of a machine of its own."""
  folders = {"TRAIN_DIR": "runs here", "ITINF_DIR": "latents", "RESULTS_DIR": "results"}
  for name, folder in folders.items():
    monkeypatch.setattr(configs, name, tmp_path / folder)
  experiments = {"train_xms": configs.TRAIN_DIR, "itinf_xms": configs.ITINF_DIR}
  monkeypatch.setattr(results, "_EXPERIMENTS", experiments)
  monkeypatch.setattr(configs, "PUBLISHED_DIR", tmp_path / "published")
  return tmp_path


def write_run(folder, wid, minutes, task="train", config=None):
  unit = hyper.WorkUnit("factorized", task, config or {}, wid, {}, f"rd_lambda={wid}", "a.py")
  run = runs.RunDir.of(folder, "1001", unit)
  run.create(unit, "1001")
  run.write_state("DONE")
  state = runs.read_json(run.state_file)
  runs.write_json(run.state_file, {**state, "time": 100.0 + 60 * minutes})
  runs.write_json(run.environment_file, [{"time": 100.0, "cpu": "a processor", "num_cpus": 2}])
  return run


def measured(run, wid, bpp=0.5, psnr=30.0, **more):
  """The results of a run, with paths of the machine wherever results have some."""
  found = result(bpp, psnr, wid=wid, **more)
  config = {
    "train_data_config": {"dataset": str(configs.DATA_DIR / "kodak")},
    "train_eval_config": {"warm_start": str(configs.TRAIN_DIR / "1000" / "wid=0-a")},
    "elsewhere": "/somewhere/else/1000/wid=0-a",
  }
  return dataclasses.replace(
    found,
    run={**found.run, "workdir": str(run.path), "num_parameters": 1234},
    config=config,
    overrides={"train_data_config.dataset": str(configs.DATA_DIR / "kodak")},
  )


def publish_all(site, *more):
  argv = ["--dataset=kodak", f"--results_dir={configs.RESULTS_DIR}", f"--out={site / 'out'}"]
  publish.run([*argv, *more])
  return {p.name: results.read(p) for p in results.find(site / "out", "kodak")}


def test_copies_name_runs_and_data_sets_and_no_path(site):
  run = write_run(configs.TRAIN_DIR, 3, minutes=7)
  results.write(configs.RESULTS_DIR, measured(run, 3))
  ((name, found),) = publish_all(site).items()
  assert name == results.find(configs.RESULTS_DIR, "kodak")[0].name
  assert found.run["workdir"] == "train_xms/1001/wid=3-rd_lambda=3"
  assert found.config["train_data_config"]["dataset"] == "kodak"
  assert found.overrides["train_data_config.dataset"] == "kodak"
  assert found.config["train_eval_config"]["warm_start"] == "train_xms/1000/wid=0-a"
  assert found.config["elsewhere"] == "1000/wid=0-a"
  assert str(site) not in (site / "out" / "kodak" / "bitstream" / name).read_text()
  assert publish.check(site / "out") == 1


def test_copies_hold_six_digits_and_all_records(site):
  run = write_run(configs.TRAIN_DIR, 0, minutes=1)
  there = measured(run, 0, bpp=1 / 3, psnr=30.123456789)
  results.write(configs.RESULTS_DIR, there)
  (copy,) = publish_all(site).values()
  assert [r.image for r in copy.records] == [r.image for r in there.records]
  for ours, theirs in zip(copy.records, there.records):
    assert ours.num_bytes == theirs.num_bytes
    assert ours.bpp == pytest.approx(theirs.bpp, rel=1e-5)
    assert ours.msssim != theirs.msssim and len(str(ours.msssim)) == 8
    assert ours.psnr_db == pytest.approx(theirs.psnr_db, rel=1e-5)


def test_a_report_of_copies_needs_no_run(site):
  """Size, steps, minutes and machine are in the copies."""
  write_jpeg(configs.RESULTS_DIR)
  for wid, (bpp, psnr) in enumerate(zip(BPP[:3], PSNR)):
    run = write_run(configs.TRAIN_DIR, wid, minutes=wid + 2)
    results.write(configs.RESULTS_DIR, measured(run, wid, bpp, psnr))
  optimised = measured(run, 7, 0.9, 38.0, mode="itinf", xid="sga")
  optimised.run.update(workdir=str(configs.ITINF_DIR / "sga" / "x"), trained_run=str(run.path))
  del optimised.run["num_parameters"]
  optimised.config.update({
    "itinf_config": {"method": "sga"}, "train_eval_config": {"num_steps": 40}
  })  # fmt: skip
  results.write(configs.RESULTS_DIR, optimised)
  publish_all(site)
  configs.TRAIN_DIR.rename(site / "gone")
  argv = ["--dataset=kodak", f"--results_dir={site / 'out'}", f"--out={site / 'page'}"]
  text = report.run([*argv, "--compact"], say=lambda line: None).read_text()
  size = "1,234 parameters, "
  assert f"{size}3 trained runs of 1,000 steps, 2.0\u20134.0 min each" in text
  assert f"{size}trained for 1,000 steps, 4.0 min; then 40 steps of sga for each picture" in text
  assert "Trained on: a processor, 2 CPUs" in text
  assert "records.csv" not in text and not (site / "page" / "records.csv").exists()
  assert str(site) not in text


def test_what_is_gone_leaves_the_copies(site):
  run = write_run(configs.TRAIN_DIR, 0, minutes=1)
  results.write(configs.RESULTS_DIR, measured(run, 0))
  path = results.write(configs.RESULTS_DIR, measured(run, 1))
  assert len(publish_all(site)) == 2
  path.unlink()
  assert len(publish_all(site)) == 1
  results.write(configs.RESULTS_DIR, result(xid="other"))
  write_jpeg(configs.RESULTS_DIR)
  assert len(publish_all(site)) == 7
  assert len(publish_all(site, f"--runs={configs.TRAIN_DIR}/1001")) == 6


def test_what_cannot_be_published_is_named(site):
  with pytest.raises(publish.PublishError, match="No results"):
    publish_all(site)
  run = write_run(configs.TRAIN_DIR, 0, minutes=1)
  path = results.write(configs.RESULTS_DIR, measured(run, 0))
  path.write_text("{")
  with pytest.raises(publish.PublishError, match=r"1 results cannot be used.*not JSON"):
    publish_all(site)
  found = measured(run, 0)
  found.run["label"] = "made in /scratch/me/x"
  results.write(configs.RESULTS_DIR, found)
  with pytest.raises(publish.PublishError, match="'/scratch/me/x', a path of this machine"):
    publish_all(site)
  assert not (site / "out").exists()


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ('"/tmp/a/b"', True),
    ("made in /scratch/main.", True),
    ("--workdir=/scratch/me/x", True),
    ("https://a.org/data/x and docs/tmp/x, </data/x>", False),
    ("json_results/kodak, 8/pixels", False),
    ('src="data:image/png;base64,AA/tmp/AA/scratch/x"', False),
    ("in PROJECT/x", True),
  ],
)
def test_paths_of_a_machine_are_told_from_others(tmp_path, text, found):
  text = text.replace("PROJECT", str(configs.PROJECT_DIR))
  assert bool(list(publish.machine_paths(text))) == found
  (tmp_path / "page.html").write_text(text)
  if found:
    with pytest.raises(publish.PublishError, match=r"page\.html"):
      publish.check(tmp_path)
  else:
    assert publish.check(tmp_path) == 1


def test_runs_that_optimise_other_pictures_are_not_missed(site):
  write_jpeg(configs.RESULTS_DIR)
  for wid, dataset in enumerate(("kodak", "cid22-valid")):
    config = {"data_config": {"dataset": dataset}}
    write_run(configs.TRAIN_DIR, wid, 1, task="itinf", config=config)
  write_run(configs.TRAIN_DIR, 2, 1)
  statuses = report_data.run_statuses([f"{configs.TRAIN_DIR}/1001"], "kodak")
  assert sorted(s.key[2] for s in statuses) == ["0", "2"]


# --- What is committed in docs/report ---


def committed(dataset):
  folder = COMMITTED / "results" / dataset
  if not folder.is_dir():
    pytest.skip("There is no committed report yet.")
  return [results.read(p) for p in results.find(COMMITTED / "results", dataset)]


SYSTEMS = {  # Group of its curves -> the rates that it has at least.
  "factorized-overnight-bls2017": 3,
  "mshyper-overnight-mbt2018": 3,
  "mshyper-overnight-jpegl": 3,
  "mshyper-overnight-two_layer_syn": 3,
  "mshyper-overnight-two_layer_syn2": 3,
  "mshyper-overnight-two_layer_syn2-sga": 3,
  "factorized-overnight-vbq": 16,
  "factorized-overnight-uniform": 3,
  "factorized-overnight-kmeans": 3,
  "ljpeg-overnight-ljpeg": 3,
  "ljpeg-overnight-attention": 3,
  "ljpeg-overnight-pre_edit": 3,
  **{
    f"classical-{name}": 3
    for name in ("jpeg", "webp", "jpeg2000", "avif", "jxl", "jpegli", "mozjpeg")
  },
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_committed_report_has_every_system_in_real_bytes(dataset):
  curves = results.curves(committed(dataset))
  for group, rates in SYSTEMS.items():
    # SGA's part is called by its data set, VBQ's curves by their calibration.
    exact = [c for c in curves if c.group in (group, f"{group}-{dataset}")]
    (curve,) = exact or [c for c in curves if c.group.startswith(f"{group} ")]
    assert len(curve.bpp) >= rates, group
  for found in committed(dataset):
    assert found.mode != "estimated"
    for r in found.records:
      assert r.bpp == pytest.approx(8 * r.num_bytes / r.num_pixels, rel=1e-5)


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_committed_report_states_size_and_time(dataset):
  for found in committed(dataset):
    training = report_data.training(found)
    if training is None:
      assert found.run["family"] == "classical"
    else:
      assert 0 < training.minutes < 60 and training.machine
      assert training.parameters or found.mode == "itinf"


@pytest.mark.slow
@pytest.mark.parametrize("dataset", DATASETS)
def test_the_committed_report_is_what_its_results_give(dataset, tmp_path):
  committed(dataset)
  argv = [f"--dataset={dataset}", f"--results_dir={COMMITTED / 'results'}", "--compact"]
  report.run([*argv, "--crop=none", f"--out={tmp_path}"], say=lambda line: None)
  for name in ("curves.csv", "bd_rate.csv"):
    ours, theirs = (read_csv(folder / name) for folder in (tmp_path, COMMITTED / dataset))
    assert ours == theirs, name
  assert (COMMITTED / dataset / "index.html").stat().st_size < 6_000_000


def read_csv(path: pathlib.Path) -> list[dict[str, object]]:
  """Rows; numbers to nine digits, for logarithms differ between machines."""

  def value(text: str) -> object:
    try:
      return float(f"{float(text):.9g}")
    except ValueError:
      return text

  rows = csv.DictReader(io.StringIO(path.read_text()))
  return [{k: value(v) for k, v in row.items()} for row in rows]


def test_the_committed_report_names_no_path_of_a_machine():
  for dataset in DATASETS:
    committed(dataset)
  assert publish.check(COMMITTED) > 100
  for dataset in DATASETS:
    for path in results.find(COMMITTED / "results", dataset):
      run = json.loads(path.read_text())["run"]
      assert run["workdir"] is None or run["workdir"].startswith("train_xms/overnight/")


# --- The half hour ---

HALF_HOUR = ROOT / "docs" / "half_hour"


def half_hour_curves():
  found = [results.read(p) for p in results.find(HALF_HOUR / "results", "kodak")]
  for file in found:
    assert file.mode == "bitstream" and len(file.records) == 24
    for r in file.records:
      assert r.bpp == pytest.approx(8 * r.num_bytes / r.num_pixels, rel=1e-5)
  return {c.group: c for c in results.curves(found)}


def test_half_an_hour_is_above_jpeg_everywhere_and_above_webp_and_the_peer():
  curves = half_hour_curves()
  ours = next(c for group, c in curves.items() if group.startswith("mshyper-half_hour"))
  assert len(ours.bpp) >= 4 and ours.bpp[0] < 0.2 and ours.bpp[-1] > 1.0
  for rate in np.linspace(0.2, 1.0, 81):
    for other in ("jpeg", "jpeg-optimized"):
      jpeg = half_hour.psnr_at(curves[f"classical-{other}"], rate)
      assert jpeg is None or half_hour.psnr_at(ours, rate) > jpeg, (other, rate)
  assert bd.gain(curves["classical-webp"], ours).most_db > 0
  (peer,) = [c for group, c in curves.items() if group.startswith("compressai")]
  assert len(peer.bpp) >= 4
  assert max(peer.psnr_db) < max(ours.psnr_db)
  for bpp, psnr_db in zip(peer.bpp, peer.psnr_db):
    own = half_hour.psnr_at(ours, bpp)
    assert own is None or own > psnr_db, bpp


def test_the_half_hour_names_no_path_of_a_machine():
  half_hour_curves()
  assert publish.check(HALF_HOUR) > 20
