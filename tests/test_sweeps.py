# ruff: noqa: F811
"""Sweeps of several configs, and runs that start from another run of their sweep."""

import json
import pathlib
import random
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launch_eval
from common import hyper, launchers, runs, slurm
from sweeps import half_hour
from tests import fake_slurm
from tests.conftest import ROOT, run_entry_point, tiny_arguments
from tests.test_launch import TRAIN, command, project, tree  # noqa: F401
from tests.test_slurm import cluster, listens, status, submit, wait_for  # noqa: F401

CONFIG = """
import ml_collections
from ml_collections import config_dict
from common import hyper

def get_config(variant=""):
  hyper.check_variant(variant, ["small"])
  config = ml_collections.ConfigDict()
  config.num_steps = 2
  config.seed = 0
  config.mode = "done"
  config.needs = ""
  config.breaks = 0
  config.rd_lambda = 0.01
  config.train_eval_config = ml_collections.ConfigDict()
  config.train_eval_config.warm_start = config_dict.placeholder(str)
  return config

def get_cfg_str(config):
  return hyper.name_from(config, ["rd_lambda", "seed"])

def get_hyper(variant=""):
  return hyper.from_first(hyper.sweep("rd_lambda", [0.08, 0.02, 0.005]))
"""

SWEEP = """
from common import hyper

def get_sweep(variant=""):
  hyper.check_variant(variant, ["bad"])
  return [
    hyper.Part("fake.train", "fake/configs/rates.py", name="deep"),
    hyper.Part("other.train", "other/configs/rates.py:small",
               hyper.zip(hyper.sweep("rd_lambda", [0.08, 0.02]),
                         hyper.sweep(hyper.WARM_START, ["wid=0 of deep", "wid=2 of deep"])),
               overrides={"num_steps": 3}),
    hyper.Part("other.train", "other/configs/rates.py", [{}], name="plain"),
  ]
"""


@pytest.fixture
def sweep(project):
  """A sweep file of two families, whose trainings look for what they start from."""
  text = TRAIN.replace("unit.wid == 1", "unit.wid == config['breaks']")
  look = "with run.locked():\n"
  text = text.replace(look, f"source = runs.with_source(unit, run).config\n{look}")
  text = text.replace(
    '"time": time.time()}', '"time": time.time(), "source": source["train_eval_config"]}'
  )
  assert text.count("source") == 4
  for family in ("fake", "other"):
    (project / family / "configs").mkdir(parents=True, exist_ok=True)
    (project / family / "__init__.py").touch()
    (project / family / "train.py").write_text(text)
    (project / family / "eval.py").write_text((project / "fake" / "eval.py").read_text())
  (project / "fake" / "configs" / "rates.py").write_text(CONFIG)
  extra = CONFIG.replace("  return config", "  config.extra = 1.0\n  return config", 1)
  (project / "other" / "configs" / "rates.py").write_text(extra)
  file = project / "sweep.py"
  file.write_text(SWEEP)
  return file


def write_rates(project, settings):
  """The fake family's config, swept as given; returns its path."""
  file = project / "fake" / "configs" / "rates.py"
  head = CONFIG.partition("def get_hyper")[0]
  file.write_text(f"{head}def get_hyper(variant=''):\n  return {settings}\n")
  return str(file)


def times(command, xid, wid):
  """When a run's task began, and when it was DONE; what it began with."""
  run = command.run(xid, wid)
  facts = json.loads((run.path / "facts.json").read_text())
  return facts["time"], run.read_state()["time"], facts["source"]["warm_start"]


def check_order(command, xid):
  """Every run started after the one that it starts from was DONE, and with that one's folder."""
  experiment = launchers.find_experiment(xid, command.experiments)
  waited = 0
  for run in experiment.record["runs"]:
    began, _, source = times(command, xid, run["wid"])
    if "after" in run:
      waited += 1
      assert times(command, xid, run["after"])[1] <= began
      assert source == str(command.run(xid, run["after"]).path)
    else:
      assert source is None
  return waited


# Settings


def own_source(setting):
  value = setting.get(hyper.WARM_START)
  return None if value is None else int(value.partition("=")[2])


sizes = st.integers(1, 4)


@given(sizes, sizes, sizes)
def test_from_first_keeps_its_meaning_in_products_and_chains(a, b, c):
  rates = hyper.from_first(hyper.sweep("rate", range(a)))
  seeds, widths = hyper.sweep("seed", range(b)), hyper.sweep("width", range(c))
  for settings in (
    hyper.product(rates, seeds, widths),
    hyper.product(seeds, rates, widths),
    hyper.chain(hyper.product(seeds, rates), hyper.product(widths, rates), rates),
  ):
    for setting in settings:
      source = own_source(setting)
      if setting["rate"] == 0:
        assert source is None
      else:
        first = {k: v for k, v in setting.items() if k != hyper.WARM_START}
        assert settings[source] == {**first, "rate": 0}


def test_from_first_refuses_settings_that_start_elsewhere():
  with pytest.raises(hyper.ConfigError, match=r"has a .* already"):
    hyper.from_first([{}, {hyper.WARM_START: "train_xms/7"}])


def test_work_units_without_a_part_are_recorded_as_ever():
  unit = hyper.WorkUnit("f", "train", {}, 0, {}, "r", "c.py")
  assert "part" not in unit.to_json()
  assert hyper.WorkUnit.from_json(unit.to_json()) == unit
  part = hyper.WorkUnit("f", "train", {}, 0, {}, "r", "c.py", part="p")
  assert hyper.WorkUnit.from_json(json.loads(json.dumps(part.to_json()))) == part
  with pytest.raises(hyper.ConfigError, match=r"missing \['wid'\]"):
    hyper.WorkUnit.from_json({k: v for k, v in unit.to_json().items() if k != "wid"})


WARM = "'train_eval_config.warm_start'"


@pytest.mark.parametrize(
  ("settings", "says"),
  [
    (f"[{{}}, {{{WARM}: 'wid=1', 'seed': 1}}]", "circle: wid 1 -> 1"),
    (f"[{{{WARM}: 'wid=0'}}]", "circle: wid 0 -> 0"),
    (f"[{{{WARM}: 'wid=2'}}, {{{WARM}: 'wid=0', 'seed': 1}}, {{{WARM}: 'wid=1', 'seed': 2}}]",
     "circle: wid 0 -> 2 -> 1 -> 0"),
    (f"[{{}}, {{{WARM}: 'wid=5', 'seed': 1}}]", "starts from wid 5"),
    (f"[{{}}, {{{WARM}: 'wid=0 of deep', 'seed': 1}}]", "within a sweep file"),
  ],
)  # fmt: skip
def test_what_cannot_start_is_refused_before_anything_is_written(
  command, sweep, project, tmp_path, settings, says
):
  file = write_rates(project, settings)
  before = tree(tmp_path)
  assert command.launch(config=file) == 2
  assert says in command.err and command.err.count("\n") == 1
  assert tree(tmp_path) == before


@pytest.mark.parametrize(
  ("old", "new", "says"),
  [
    ("wid=2 of deep", "wid=3 of deep", "has no setting 3; it has 0 to 2"),
    ("wid=2 of deep", "wid=2 of depp", "no part 'depp'. Known: deep, rates-small, plain"),
    ("wid=2 of deep", "wid=1", "circle: wid 4 -> 4"),
    ('name="plain"', 'name="deep"', "two parts are called 'deep'"),
    ('name="plain"', 'name="a b"', "'a_b'"),
    ("[{}]", "[]", "has no settings"),
    ("[{}]", "[{'sed': 1}]", "Part 'plain': Unknown config key 'sed'"),
    ("[{}]", "[{'seed': 1}, {'seed': 1}]", "are the same"),
    ("[{}]", "[{'num_steps': 1}, {}]", "same run name"),
    ("other.train", "other.eval", "Unknown --main 'other.eval'"),
    ("rates.py:small", "rate.py:small", "No config file"),
    ("rates.py:small", "rates.py:smal", "Unknown variant 'smal'"),
    ('{"num_steps": 3}', '{"rd_lambda": 3.0}', "'rd_lambda' is swept by part 'rates-small'"),
    ("def get_sweep", "def get_config", "defines no get_sweep(). It has get_config()"),
    ("return [", "return 3 and [hyper.WARM_START] or [", "is no hyper.Part"),
  ],
)
def test_mistakes_in_sweep_files_are_one_line(command, sweep, tmp_path, old, new, says):
  assert old in SWEEP
  sweep.write_text(SWEEP.replace(old, new))
  before = tree(tmp_path)
  assert command("--sweep", str(sweep)) == 2
  assert says in command.err and command.err.count("\n") == 1, command.err
  assert tree(tmp_path) == before


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    (["--main=fake.train"], "without --main, --config"),
    (["--config=fake/configs/rates.py"], "without --main, --config"),
    (["--config.nothing=3"], "Unknown config key 'nothing'"),
    (["--config.seed=x"], "whole number"),
    (["--config.rd_lambda=0.5"], "swept by part 'deep'"),
    (["--config.train_eval_config.warm_start=x"], "swept by part 'deep'"),
    (["--config.seed", "3"], "Left over"),
  ],
)
def test_mistakes_beside_a_sweep_file(command, sweep, argv, says):
  if argv[0].startswith("--config="):
    argv = [f"--config={sweep.parent / 'fake' / 'configs' / 'rates.py'}"]
  assert command(f"--sweep={sweep}", *argv) == 2
  assert says in command.err + command.out
  assert not command.experiments.exists()


def test_dry_run_shows_every_part_and_writes_nothing(command, sweep, tmp_path):
  before = tree(tmp_path)
  more = ["--dry_run", "--executor=slurm", "--then_eval=sample", "--config.extra=2"]
  assert command("--sweep", str(sweep), *more) == 0
  assert tree(tmp_path) == before
  for part in (
    "deep: fake.train, fake/configs/rates.py\n", "rates-small: other.train", "deep-rd_lambda=0.02",
    "rates-small-rd_lambda=0.08-seed=0", "For all: num_steps=3, extra=2.0", "6 settings",
    "fake.train, other.train", "#SBATCH --array=0,5\n", "--job-name=sweep",
    "# then 2 with --dependency=afterok:<id>_<index> for the 4 runs", "# then 3 with --dep",
  ):  # fmt: skip
    assert part in command.out, part
  assert "extra" not in command.out.partition("rates-small:")[0]


# On this machine


@pytest.mark.slow
def test_a_sweep_of_two_families_trains_each_run_after_what_it_starts_from(command, sweep):
  argv = ["--jobs=3", "--xid=x", "--then_eval=sample", "--config.seed=7"]
  assert command("--sweep", str(sweep), *argv) == 0, command.err
  assert command.states("x") == ["DONE"] * 12
  assert check_order(command, "x") == 4
  record = json.loads((command.experiments / "x" / "experiment.json").read_text())
  assert [run.get("after") for run in record["runs"]] == [None, 0, 0, 0, 2, None]
  units = [command.run("x", wid).read_work_unit() for wid in range(6)]
  assert [(u.family, u.part) for u in units] == (
    [("fake", "deep")] * 3 + [("other", "rates-small")] * 2 + [("other", "plain")]
  )
  assert [u.config["num_steps"] for u in units] == [2, 2, 2, 3, 3, 2]
  assert [u.config["seed"] for u in units] == [7] * 6
  assert [u.config.get("extra") for u in units] == [None] * 3 + [1.0] * 3
  assert units[4].config["train_eval_config"]["warm_start"] == "wid=2"
  assert units[4].runname == "rates-small-rd_lambda=0.02-seed=7"
  experiment = launchers.find_experiment("x", command.experiments)
  assert [experiment._unit(run) for run in record["runs"]] == units
  for job in experiment.jobs()[6:]:
    assert job.argv[2] == f"{units[job.wid].family}.eval"
  assert command("status", "x") == 0
  assert "12 DONE" in command.out


@pytest.mark.slow
def test_dependants_of_a_failed_run_wait_and_go_with_its_rerun(command, sweep, tmp_path):
  needed = tmp_path / "needed"
  argv = ["--jobs=2", "--xid=x", f"--config.needs={needed}", "--config.breaks=0"]
  assert command("--sweep", str(sweep), *argv) == 1
  assert command.states("x") == ["FAILED", *["PENDING"] * 4, "DONE"]
  assert command.out.count("waits for wid 0, which is FAILED") == 3
  assert "waits for wid 2\n" in command.out.replace("  ", "") or "waits for wid 2" in command.out
  assert command("status", "x", "--watch", "--every=0.1") == 0  # It comes to an end.
  assert command("rerun", "x", "--wids=1-4") == 1
  assert "Nothing to rerun" in command.out and "which is FAILED" in command.out
  needed.touch()
  moved = command.experiments.with_name("elsewhere")
  command.experiments.rename(moved)
  command.experiments = moved
  assert command("rerun", "x", "--states=FAILED") == 0, command.out
  assert command.states("x") == ["DONE"] * 6
  assert check_order(command, "x") == 4
  assert command.run("x", 5).read_state()["attempt"] == 1


@pytest.mark.slow
def test_a_dependant_that_failed_itself_is_rerun_alone(command, sweep, tmp_path):
  needed = tmp_path / "needed"
  argv = ["--xid=x", f"--config.needs={needed}", "--config.breaks=2"]
  assert command("--sweep", str(sweep), *argv) == 1
  assert command.states("x") == ["DONE", "DONE", "FAILED", "DONE", "PENDING", "DONE"]
  needed.touch()
  assert command("rerun", "x") == 0
  assert [command.run("x", wid).read_state()["attempt"] for wid in range(6)] == [1, 1, 2, 1, 1, 1]
  assert check_order(command, "x") == 4


def test_an_ordinary_sweep_may_start_from_a_later_setting(command, sweep, project):
  file = write_rates(
    project, f"[{{{WARM}: 'wid=2'}}, {{{WARM}: 'wid=0', 'seed': 1}}, {{'seed': 2}}]"
  )
  assert command.launch("--xid=x", "--jobs=3", config=file) == 0, command.err
  assert check_order(command, "x") == 2
  assert [job.wid for job in launchers.find_experiment("x", command.experiments).jobs()] == [
    2,
    0,
    1,
  ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_forest_of_runs_is_trained_in_order(command, sweep, project, seed):
  drawn = random.Random(seed)
  order = list(range(9))
  drawn.shuffle(order)
  settings = [{"seed": wid} for wid in range(9)]
  for i, wid in enumerate(order[1:], 1):
    if drawn.random() < 0.7:
      settings[wid][hyper.WARM_START] = f"wid={drawn.choice(order[:i])}"
  assert command.launch("--xid=x", "--jobs=4", config=write_rates(project, settings)) == 0
  assert command.states("x") == ["DONE"] * 9
  assert check_order(command, "x") == sum(hyper.WARM_START in s for s in settings)


@pytest.mark.slow
def test_a_run_by_hand_says_what_it_waits_for(pictures, tmp_path, capsys):
  """One training of a sweep outside of a launcher: its source is found within the same --xid."""
  file = tmp_path / "rates.py"
  file.write_text(
    "from common import hyper\nfrom factorized.configs.bls2017 import get_cfg_str, get_config\n"
    "def get_hyper(variant=''):\n"
    "  return hyper.from_first(hyper.sweep('model_config.rd_lambda', [0.08, 0.01]))\n"
  )
  argv = tiny_arguments(pictures, tmp_path / "xms", steps=2)
  argv[argv.index("--config") + 1] = f"{file}:tiny"
  for more, says in (
    ([], "--wid 0 --xid NAME first"),
    (["--xid=s"], "which is not in"),
  ):
    assert run_entry_point("factorized", "train", [*argv, "--wid=1", *more]) == 2
    assert says in capsys.readouterr().err
  assert not (tmp_path / "xms").exists()
  assert run_entry_point("factorized", "train", [*argv, "--wid=0", "--xid=s"]) == 0
  (first,) = runs.find_runs(str(tmp_path / "xms" / "s"))
  first.write_state("FAILED")
  assert run_entry_point("factorized", "train", [*argv, "--wid=1", "--xid=s"]) == 2
  assert "which is FAILED" in capsys.readouterr().err
  first.write_state("DONE")
  assert run_entry_point("factorized", "train", [*argv, "--wid=1", "--xid=s"]) == 0
  second = runs.find_runs(str(tmp_path / "xms" / "s"))[1]
  assert f"Warm start from {first.checkpoints_dir}" in second.log_file.read_text()
  config = second.read_work_unit().config
  assert config["train_eval_config"]["warm_start"] == "wid=0"


@pytest.mark.slow
def test_trainings_and_latents_of_one_sweep(pictures, tmp_path, monkeypatch):
  """Real families: checked before the launch, although what they start from is not there yet."""
  import launch
  from common import datasets, results

  monkeypatch.setattr("configs.RESULTS_DIR", tmp_path / "results")
  monkeypatch.setattr("configs.TRAIN_DIR", tmp_path / "xms")
  tiny = tiny_arguments(pictures, tmp_path / "xms", steps=2)
  overrides = [arg for arg in tiny if arg.startswith("--config.")]
  file = tmp_path / "both.py"
  file.write_text(
    "from common import hyper\ndef get_sweep():\n"
    "  rates = hyper.sweep('model_config.rd_lambda', [0.08, 0.01])\n"
    "  return [\n"
    "    hyper.Part('factorized.train', 'factorized/configs/bls2017.py:tiny',\n"
    "               hyper.from_first(rates), name='bls'),\n"
    "    hyper.Part('factorized.itinf', 'factorized/configs/itinf.py:tiny',\n"
    f"               hyper.runs_of('bls', [0, 1]), {{'data_config.dataset': {str(pictures)!r}}}),\n"
    "  ]\n"
  )
  # The latents' config has the number of steps, too, and others of its own.
  assert launch.main(["--sweep", str(file), *overrides, "--xid=x", "--jobs=2"], ROOT) == 0
  found = runs.find_runs(str(tmp_path / "xms" / "x"))
  assert [run.read_work_unit().task for run in found] == ["train"] * 2 + ["itinf"] * 2
  assert launch_eval.trainings(found) == found[:2]
  assert launch_eval.trainings(found[2:]) == found[2:]  # Then it is said of each why it cannot be.
  assert "Warm start" in found[1].log_file.read_text()
  paths = results.find(tmp_path / "results", datasets.label(str(pictures)), ["itinf"])
  assert len(paths) == 2
  facts = [json.loads(path.read_text())["run"] for path in paths]
  assert {f["trained_run"] for f in facts} == {str(run.path) for run in found[:2]}
  assert {f["curve"] for f in facts} == {"itinf-tiny"}


# On Slurm (tests/fake_slurm.py)


def jobs_of(sources, with_evaluations):
  jobs = {}

  def make(wid):
    if wid not in jobs:
      after = None if sources[wid] is None else make(sources[wid])
      folder = runs.RunDir(pathlib.Path(f"/nowhere/wid={wid}"))
      jobs[wid] = launchers.Job(f"wid={wid}", (), folder, pathlib.Path(), {}, after, wid)
    return jobs[wid]

  for wid in range(len(sources)):
    make(wid)
  evaluations = [
    launchers.Job(f"eval {job.wid}", (), job.folder, job.cwd, {}, job, job.wid, "eval")
    for job in jobs.values()
    if with_evaluations
  ]
  return [*jobs.values(), *evaluations]


@st.composite
def submissions(draw):
  """Some of the jobs of a sweep, each after what it waits for."""
  order = draw(st.permutations(range(draw(st.integers(1, 8)))))
  sources = [None] * len(order)
  for i, wid in enumerate(order[1:], 1):
    sources[wid] = draw(st.one_of(st.none(), st.sampled_from(order[:i])))
  jobs = jobs_of(sources, draw(st.booleans()))
  return [job for job in jobs if draw(st.integers(0, 3))], draw(st.integers(1, 5))


@given(submissions())
def test_arrays_hold_every_job_once_and_depend_on_what_it_waits_for(drawn):
  jobs, size = drawn
  arrays = slurm._arrays(jobs, size)
  assert sorted((a.kind, wid) for a in arrays for wid in a.wids) == sorted(
    (job.kind, job.wid) for job in jobs
  )
  submitted = {}
  by_task = {}
  for number, array in enumerate(arrays):
    dependency = slurm._dependency(array, submitted)
    submitted[array] = str(number)
    for wid in array.wids:
      assert 0 <= wid - array.offset < size
      by_task[f"{number}_{wid - array.offset}"] = (array.kind, wid)
      job = next(j for j in jobs if (j.kind, j.wid) == (array.kind, wid))
      if job.after is None or job.after not in jobs:
        assert dependency is None
        continue
      how, _, task = dependency.partition(":")
      if job.kind == "eval":
        assert how == "aftercorr"
        task = f"{task}_{wid - array.offset}"
      else:
        assert how == "afterok"
      assert by_task[task] == ("run", job.after.wid)
  assert len(submitted) == len(arrays)


@pytest.mark.slow
def test_dependants_are_arrays_of_their_own(command, sweep, cluster):
  cluster.fault("nothing-starts")
  xid = submit_sweep(command, sweep, "--then_eval=sample")
  first, of_0, of_2, *evaluations = cluster.arrays()
  assert first.xid == xid and first.job()["array"] == "0,5"
  assert (of_0.job()["array"], of_0.job()["dependency"]) == ("1-3", f"afterok:{xid}_0")
  assert (of_2.job()["array"], of_2.job()["dependency"]) == ("4", f"afterok:{of_0.xid}_2")
  assert of_0.job()["kill-on-invalid-dep"] == "yes"
  assert [a.job()["dependency"] for a in evaluations] == [
    f"aftercorr:{a.xid}" for a in (first, of_0, of_2)
  ]
  shown = status(command, xid)
  assert shown == ["PENDING"] * 6
  assert command.out.count("waits for wid 0") == 3 and "waits for wid 2" in command.out
  cluster.fault("nothing-starts", there=False)
  for array in reversed(cluster.arrays()):  # What waits is looked at first.
    fake_slurm._start(array)
  cluster.wait()
  assert command("status", xid) == 0
  assert "12 DONE" in command.out
  assert check_order(command, xid) == 4


@pytest.mark.slow
def test_dependants_that_are_refused_are_named_and_submitted_later(command, sweep, cluster):
  cluster.fault("sbatch-refuses-2")
  assert command("--sweep", str(sweep)) == 1
  (first,) = cluster.arrays()
  assert f"Submitted: run 0,5 as {first.xid}." in command.err
  assert "Not submitted: wid 1-4." in command.err
  cluster.wait()
  assert status(command, first.xid) == ["DONE", *["PENDING"] * 4, "DONE"]
  assert "not submitted: rerun does that" in command.out
  assert "waits for wid 2; not submitted: rerun does that" in command.out
  assert command("rerun", first.xid) == 0
  assert [a.job().get("dependency") for a in cluster.arrays()[1:]] == [
    None, f"afterok:{cluster.arrays()[1].xid}_2",
  ]  # fmt: skip
  cluster.wait()
  assert status(command, first.xid) == ["DONE"] * 6
  assert check_order(command, first.xid) == 4


def submit_sweep(command, sweep, *argv):
  assert command("--sweep", str(sweep), *argv) == 0, command.err
  return next(line.split()[1][:-1] for line in command.out.splitlines() if "Experiment" in line)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_failed_source_on_slurm_and_its_rerun(command, sweep, cluster, tmp_path, late):
  needed = tmp_path / "needed"
  if late:
    cluster.fault("never-satisfied-late")
  xid = submit_sweep(command, sweep, f"--config.needs={needed}", "--config.breaks=0")
  wait_for(lambda: set(cluster.states(xid)) == {"FAILED", "COMPLETED"})
  if not late:
    cluster.wait()
  assert status(command, xid) == ["FAILED", *["PENDING"] * 4, "DONE"]
  assert command.out.count("waits for wid 0, which is FAILED") == 3
  assert command("status", xid, "--watch", "--every=0.1") == 0
  assert command("rerun", xid, "--wids=1-4") == 1
  assert "Nothing to rerun" in command.out
  needed.touch()
  before = len(cluster.arrays())
  assert command("rerun", xid) == 0
  again = cluster.arrays()[before:]
  assert [a.job()["array"] for a in again] == ["0", "1-3", "4"]
  assert again[1].job()["dependency"] == f"afterok:{again[0].xid}_0"
  assert again[2].job()["dependency"] == f"afterok:{again[1].xid}_2"
  wait_for(lambda: all(set(cluster.states(a.xid)) == {"COMPLETED"} for a in again))
  assert status(command, xid) == ["DONE"] * 6
  assert check_order(command, xid) == 4
  fake_slurm.scancel([a.xid for a in cluster.arrays()[:before]])


@pytest.mark.slow
def test_forgotten_dependants_of_a_failed_source_still_wait(command, sweep, cluster, tmp_path):
  xid = submit_sweep(command, sweep, f"--config.needs={tmp_path / 'none'}", "--config.breaks=0")
  cluster.wait()
  cluster.fault("squeue-empty")
  cluster.fault("forgotten")
  experiment = launchers.find_experiment(xid, command.experiments)
  lines = runs.read_jsonl(experiment.path / "submitted.jsonl")
  old = "".join(runs.json_line({**line, "time": 0.0}) for line in lines)
  (experiment.path / "submitted.jsonl").write_text(old)
  for wid in range(1, 5):
    run = command.run(xid, wid)
    runs.write_json(run.state_file, {**run.read_state(), "time": 0.0})
  assert status(command, xid) == ["FAILED", *["PENDING"] * 4, "DONE"]
  assert command.out.count("waits for wid 0, which is FAILED") == 3


@pytest.mark.slow
def test_source_that_is_requeued_has_not_failed(command, sweep, cluster, project, tmp_path):
  file = project / "fake" / "train.py"
  handler = "signal.signal(signal.SIGTERM, lambda n, f: stop.append(n))"
  file.write_text(
    file.read_text().replace(handler, f"{handler}\n{handler.replace('TERM', 'USR2')}")
  )
  argv = ["--config.mode=wait", f"--config.needs={tmp_path / 'go'}"]
  xid = submit_sweep(command, sweep, *argv)
  wait_for(lambda: "pid" in command.run(xid, 0).read_state())
  fake_slurm.send(xid, 0, signal.SIGUSR2)
  wait_for(lambda: command.run(xid, 0).read_state().get("attempt") == 2)
  assert status(command, xid)[1:5] == ["PENDING"] * 4
  (tmp_path / "go").touch()
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 6
  assert check_order(command, xid) == 4


@pytest.mark.slow
def test_cancelled_sweep_is_rerun_in_order(command, sweep, cluster):
  cluster.fault("nothing-starts")
  xid = submit_sweep(command, sweep)
  assert command("cancel", xid) == 0
  assert status(command, xid) == ["CANCELLED"] * 6
  cluster.fault("nothing-starts", there=False)
  assert command("rerun", xid, "--states=CANCELLED") == 0
  cluster.wait()
  assert status(command, xid) == ["DONE"] * 6
  assert check_order(command, xid) == 4


@pytest.mark.slow
def test_first_array_need_not_begin_with_wid_0(command, sweep, cluster, project):
  """Its id is the experiment's, also where the launcher was killed before it took note of it."""
  (cluster.state / "max_array_size").write_text("2")
  settings = [{"seed": wid, hyper.WARM_START: "wid=3"} for wid in range(3)]
  settings += [{"seed": 3}, {"seed": 4}]
  cluster.fault("nothing-starts")
  xid = submit(command, config=write_rates(project, settings))
  arrays = cluster.arrays()
  assert arrays[0].xid == xid
  assert [a.job()["array"] for a in arrays] == ["1", "0", "0-1", "0"]
  assert arrays[2].job()["dependency"] == f"afterok:{xid}_1"
  experiment = launchers.find_experiment(xid, command.experiments)
  noted = experiment.submitted()
  (experiment.path / "submitted.jsonl").unlink()
  first = {name: task for name, task in noted.items() if task[1].startswith(xid)}
  assert experiment.submitted() == first and len(first) == 1
  cluster.fault("nothing-starts", there=False)
  for array in arrays:
    fake_slurm._start(array)
  cluster.wait()
  assert check_order(command, xid) == 3


@pytest.mark.slow
def test_evaluations_of_old_and_new_trainings_are_all_released(command, cluster, tmp_path):
  needed = tmp_path / "needed"
  xid = submit(command, f"--config.needs={needed}", "--then_eval=sample")
  cluster.wait()
  needed.touch()
  folder = command.run(xid, 0).path / "eval-sample"
  runs.RunDir(folder).write_state("FAILED")
  assert command("rerun", xid) == 0
  cluster.wait()
  assert [a.is_held() for a in cluster.arrays()] == [False] * 5
  assert command("status", xid) == 0
  assert "8 DONE" in command.out


@pytest.mark.parametrize("variant", ["", ":trial"])
@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "sweeps").glob("[!_]*.py")))
def test_the_projects_own_sweeps_expand(file, variant):
  argv = ["launch.py", f"--sweep=sweeps/{file}{variant}", "--dry_run"]
  done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "nothing was written" in done.stdout


def test_half_an_hour_is_one_model_at_four_rates_each_from_one_beside_it():
  (part,) = half_hour.get_sweep()
  lambdas = [s["model_config.rd_lambda"] for s in part.settings]
  sources = [s.get("train_eval_config.warm_start") for s in part.settings]
  assert len(lambdas) == 4 and sources == [None, "wid=0", "wid=0", "wid=2"]
  for own, source in zip(lambdas, sources):
    if source is not None:
      ratio = own / lambdas[int(source[-1])]
      assert 0.24 < ratio < 4.1  # Further away, the grid alone is no good start.
