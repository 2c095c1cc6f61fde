"""Training runs: what they leave behind, and that interruptions change nothing."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from common import checkpoints, runs
from tests.conftest import ROOT, TINY_MODELS, picture, run_command, tiny_arguments, train

CONFIG = str(ROOT / "factorized/configs/bls2017.py:tiny")


def _start(argv, family="factorized", **environment):
  return subprocess.Popen(
    [sys.executable, "-m", f"{family}.train", *argv],
    cwd=ROOT,
    env={**os.environ, "NTC_NUM_THREADS": "1", **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _only_run(experiments):
  (path,) = experiments.glob("*/wid=*")
  return runs.RunDir.open(path)


def _weights(run):
  import tensorflow as tf

  step = checkpoints.Checkpoints(run.checkpoints_dir).latest()
  prefix = str(run.checkpoints_dir / f"step-{step:08d}" / "state")
  return {
    name: tf.train.load_variable(prefix, name)
    for name, _ in tf.train.list_variables(prefix)
    if "OBJECT_GRAPH" not in name
  }


def _assert_same_weights(a, b):
  assert a.keys() == b.keys() and len(a) > 20
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def unbroken(trained_run):
  """A run of 6 steps that nothing disturbed."""
  return trained_run


def test_a_run_leaves_everything_that_its_users_expect(unbroken):
  assert unbroken.path.name == "wid=0-rd_lambda=0.01-num_filters=6"
  state = unbroken.read_state()
  assert state["state"] == "DONE" and state["step"] == state["num_steps"] == 6
  unit = unbroken.read_work_unit()
  assert unit.overrides["train_eval_config.num_steps"] == 6
  assert unit.config["optimizer_config"]["decay_after_steps"] == 4  # 80% of 6: follows num_steps.
  (environment,) = runs.read_json(unbroken.environment_file)
  assert {"commit", "host", "python", "packages", "argv", "time"} <= set(environment)
  assert environment["packages"]["tensorflow"] == "2.14.1"
  records = runs.read_jsonl(unbroken.metrics_file)
  train = [r for r in records if r["split"] == "train"]
  assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6]
  assert {"loss", "bpp", "mse", "psnr_db", "learning_rate", "rd_lambda"} <= set(train[0])
  assert [r["step"] for r in records if r["split"] == "val"] == [3, 6]
  assert list(unbroken.tensorboard_dir.glob("events.*"))
  pictures = sorted(p.name for p in unbroken.images_dir.iterdir())
  assert pictures[0] == "step-00000003-0.png"
  with Image.open(unbroken.images_dir / pictures[0]) as picture:
    assert picture.size == (64, 32)  # Original and reconstruction side by side.
  assert checkpoints.Checkpoints(unbroken.checkpoints_dir).best()["step"] in (3, 6)


@pytest.mark.slow
def test_same_seed_same_weights_and_another_seed_others(unbroken, pictures, tmp_path):
  assert train(tiny_arguments(pictures, tmp_path / "a")) == 0
  _assert_same_weights(_weights(unbroken), _weights(_only_run(tmp_path / "a")))
  other = tiny_arguments(pictures, tmp_path / "b", "--config.train_eval_config.seed=1")
  assert train(other) == 0
  a, b = _weights(unbroken), _weights(_only_run(tmp_path / "b"))
  assert any(np.any(a[k] != b[k]) for k in a)


@pytest.mark.slow
def test_a_lost_newest_checkpoint_costs_steps_but_not_the_result(unbroken, pictures, tmp_path):
  """As after a kill at step 5 and a full disk at step 4: goes on from step 3."""
  import shutil

  copied = tmp_path / "1" / unbroken.path.name
  shutil.copytree(unbroken.path, copied)
  run = runs.RunDir.open(copied)
  ckpts = checkpoints.Checkpoints(run.checkpoints_dir)
  assert ckpts.steps() == [2, 3, 4, 6]
  shutil.rmtree(ckpts.path(6))
  data = next(ckpts.path(4).glob("*.data-*"))
  data.write_bytes(data.read_bytes()[:100])
  run.write_state("RUNNING")
  assert train(["--workdir", str(copied)]) == 0
  assert run.read_state()["state"] == "DONE"
  _assert_same_weights(_weights(unbroken), _weights(run))
  assert [r["step"] for r in runs.read_jsonl(run.metrics_file) if r["split"] == "train"] == [
    1, 2, 3, 4, 5, 6, 4, 5, 6,
  ]  # fmt: skip


@pytest.mark.parametrize("kept", [0, 1], ids=["no record", "record, and no mark of the best"])
def test_a_kill_between_a_checkpoint_and_its_validation_loses_no_validation(
  unbroken, tmp_path, kept
):
  import shutil

  copied = tmp_path / "1" / unbroken.path.name
  shutil.copytree(unbroken.path, copied)
  run = runs.RunDir.open(copied)
  lines = run.metrics_file.read_text().splitlines(keepends=True)
  assert json.loads(lines[-1])["split"] == "val"
  # As if killed after the last checkpoint, or a little later.
  run.metrics_file.write_text("".join(lines[: len(lines) - 1 + kept]))
  (run.checkpoints_dir / "best.json").unlink()
  run.write_state("RUNNING")
  assert train(["--workdir", str(copied)]) == 0
  last = runs.read_jsonl(run.metrics_file)[-1]
  expected = json.loads(lines[-1])
  assert {**last, "time": 0} == {**expected, "time": 0}
  assert checkpoints.Checkpoints(run.checkpoints_dir).best()["step"] == 6
  assert run.read_state()["state"] == "DONE"


def test_pictures_that_all_break_while_training_are_named_without_a_traceback(tmp_path, capsys):
  folder = tmp_path / "broken"
  folder.mkdir()
  for i in range(3):
    Image.fromarray(picture(48, 64, i)).save(folder / f"{i}.png")
    content = (folder / f"{i}.png").read_bytes()
    (folder / f"{i}.png").write_bytes(content[: len(content) // 3])  # The headers are whole.
  argv = tiny_arguments(folder, tmp_path / "x", "--config.train_data_config.val_split=None")
  assert train(argv) == 1
  assert "No picture of 'broken" in capsys.readouterr().err
  (path,) = (tmp_path / "x").glob("*/wid=*")
  reason = runs.RunDir(path).read_state()["reason"]
  assert reason.startswith("DataError: No picture") and "Traceback" not in reason


def test_a_done_run_is_left_alone(unbroken, pictures, capsys):
  before = unbroken.state_file.read_bytes()
  assert train(["--workdir", str(unbroken.path)]) == 0
  argv = tiny_arguments(pictures, unbroken.path.parent.parent, "--xid", "1")
  assert train(argv) == 0
  assert unbroken.state_file.read_bytes() == before
  assert "DONE already" in capsys.readouterr().out


def test_another_config_in_the_same_place_is_refused(unbroken, pictures, capsys):
  argv = tiny_arguments(pictures, unbroken.path.parent.parent, "--xid", "1", steps=9)
  assert train(argv) == 2
  assert "train_eval_config.num_steps" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY_MODELS)
def test_killed_at_an_arbitrary_step_it_ends_with_the_weights_of_an_unbroken_run(
  pictures, tmp_path, family
):
  steps = 40
  argv = tiny_arguments(pictures, tmp_path / "killed", "--xid", "1", steps=steps, family=family)
  kills = 0
  for attempt in range(40):
    process = _start(argv, family)
    run_dirs = lambda: list((tmp_path / "killed").glob("1/wid=*"))  # noqa: E731
    # Not at a chosen step: some time after the first steps of this attempt.
    begun = time.monotonic()
    first = None
    while process.poll() is None and time.monotonic() - begun < 120:
      records = runs.read_jsonl(runs.RunDir(run_dirs()[0]).metrics_file) if run_dirs() else []
      first = len(records) if first is None else first
      if len(records) > first + 1 + 2 * attempt and kills < 3:
        process.send_signal(signal.SIGKILL)
        kills += 1
        break
      time.sleep(0.01)
    code = process.wait()
    if code == 0:
      break
    assert code == -signal.SIGKILL, process.stdout.read()
  assert kills >= 2, "It ended too soon to be killed."
  run = _only_run(tmp_path / "killed")
  assert run.read_state()["state"] == "DONE"
  assert len(runs.read_json(run.environment_file)) == kills + 1
  argv = tiny_arguments(pictures, tmp_path / "whole", "--xid", "1", steps=steps, family=family)
  process = _start(argv, family)
  output, _ = process.communicate()
  assert process.returncode == 0, output
  _assert_same_weights(_weights(_only_run(tmp_path / "whole")), _weights(run))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=lambda s: s.name)
def test_asked_to_stop_it_saves_its_state_and_exits_75(pictures, tmp_path, number):
  argv = tiny_arguments(pictures, tmp_path, "--xid", "1", steps=100_000)
  argv.append("--config.train_eval_config.checkpoint_every_steps=90000")
  argv.append("--config.train_eval_config.eval_every_steps=90000")
  process = _start(argv)
  while not any(runs.read_jsonl(p) for p in tmp_path.glob("1/wid=*/metrics.jsonl")):
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.05)
  process.send_signal(number)
  assert process.wait(60) == runs.EXIT_RESUME
  run = _only_run(tmp_path)
  state = run.read_state()
  assert state["state"] == "REQUEUED" and state["step"] > 0
  assert checkpoints.Checkpoints(run.checkpoints_dir).latest() == state["step"]


@pytest.mark.slow
def test_a_run_that_cannot_be_written_is_an_error_and_not_touched(
  pictures, trained_run, tmp_path, capsys
):
  """A folder in the lock's place: permissions do not hold for all users."""
  shutil.copytree(trained_run.path, tmp_path / "1" / trained_run.path.name)
  run = runs.RunDir.open(tmp_path / "1" / trained_run.path.name)
  run.write_state("RUNNING")
  run.lock_file.unlink()
  run.lock_file.mkdir()
  assert train(["--workdir", str(run.path)]) == 1
  error = capsys.readouterr().err
  assert f"{run.path} cannot be written" in error and "Traceback" not in error
  assert run.read_state()["state"] == "RUNNING"


@pytest.mark.slow
def test_two_processes_on_one_run_the_second_refuses_and_names_the_first(pictures, tmp_path):
  argv = tiny_arguments(pictures, tmp_path, "--xid", "1", steps=100_000)
  first = _start(argv)
  try:
    while not any(runs.read_jsonl(p) for p in tmp_path.glob("1/wid=*/metrics.jsonl")):
      assert first.poll() is None, first.stdout.read()
      time.sleep(0.05)
    second = _start(argv)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"process {first.pid}" in output
    assert _only_run(tmp_path).read_state()["state"] == "RUNNING"
  finally:
    first.kill()
    first.wait()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(
  pictures, tmp_path, capsys
):
  argv = tiny_arguments(pictures, tmp_path, "--config.optimizer_config.learning_rate=1e30")
  assert train(argv) == 1
  run = _only_run(tmp_path)
  state = run.read_state()
  assert state["state"] == "FAILED" and "is not finite" in state["reason"]
  assert "Step " in state["reason"] and "loss" in state["reason"]


@pytest.mark.parametrize(
  "override,expected",
  [
    ("--config.model_config.rd_lamda=1", "rd_lambda"),
    ("--config.optimizer_config.schedule=cosin", "Known: constant, piecewise, cosine"),
    ("--config.model_config.quantizer=noise", "Known: mixedq"),
    ("--config.model_config.analysis.name=BLS2018Analysis", "BLS2017Analysis"),
    ("--config.model_config.init=dtc", "Known: random, dct"),
    ("--config.train_data_config.dataset=kodac", "kodak"),
    ("--config.train_data_config.batchsize=0", "batchsize"),
    ("--config.train_eval_config.num_steps=0", "num_steps"),
    ("--config.model_config.quantizer=sga", "does not train"),
    ("--config.model_config.quantizer=round", "Known: mixedq, unoise"),
    ("--config.train_eval_config.seed=-1", "seed is -1"),
    ("--config.train_eval_config.num_images_to_log=-1", "num_images_to_log"),
    ("--config.train_data_config.patchsize=4096", "smaller than the patch"),
    ("--config.optimizer_config.gradient_clip_norm=0", "above 0"),
    ("--config.optimizer_config.learning_rate=nan", "learning_rate"),
    ("--config.train_eval_config.num_steps=many", "num_steps"),
    ("--config.model_config.rd_lambda=-1", "rd_lambda"),
    ("--config.model_config.synthesis.in_channels=7", "6 channels"),
    ("--config.train_eval_config.warm_start=nowhere", "nowhere"),
    ("--wid=12", "0 to 3"),
    ("--nonsense=1", "nonsense"),
    ("extra", "extra"),
  ],
)
def test_bad_input_names_the_fix_before_anything_is_written(
  pictures, tmp_path, capsys, override, expected
):
  assert train([*tiny_arguments(pictures, tmp_path / "x"), override]) == 2
  error = capsys.readouterr().err
  assert expected in error and "Traceback" not in error
  assert not (tmp_path / "x").exists()


def test_launchers_can_have_work_units_checked(unbroken, tmp_path, capsys):
  good = unbroken.read_work_unit().to_json()
  bad = json.loads(json.dumps(good))
  bad["wid"] = 7
  bad["config"]["model_config"]["quantizer"] = "noise"
  file = tmp_path / "units.json"
  file.write_text(json.dumps([good]))
  assert train([f"--check_units={file}"]) == 0
  file.write_text(json.dumps([good, bad]))
  assert train([f"--check_units={file}"]) == 2
  assert "Error: wid 7: model_config.quantizer 'noise'" in capsys.readouterr().err


def test_a_missing_config_lists_those_that_there_are(tmp_path, capsys):
  assert train(["--config", str(ROOT / "factorized/configs/bls2018.py")]) == 2
  assert "bls2017.py" in capsys.readouterr().err
  assert train(["--config", f"{CONFIG}x"]) == 2
  assert "Known: tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_a_setting_of_the_sweep_by_its_wid(pictures, tmp_path):
  argv = tiny_arguments(pictures, tmp_path, "--wid", "3", steps=1)
  assert train(argv) == 0
  run = _only_run(tmp_path)
  assert run.path.name.startswith("wid=3-rd_lambda=0.0025")
  assert run.read_work_unit().config["model_config"]["rd_lambda"] == 0.0025


@pytest.mark.slow
def test_garbage_is_collected_from_the_first_step_on(pictures, tmp_path, monkeypatch):
  """A start is faster without; that must not outlive it, even where the training fails."""
  from common import cli, train_lib
  from factorized import train as entry

  seen = []
  make_step = train_lib.make_train_step

  def make(*args):
    step = make_step(*args)
    return lambda *a: seen.append(gc.isenabled()) or step(*a)

  monkeypatch.setattr(train_lib, "make_train_step", make)
  argv = tiny_arguments(pictures, tmp_path, "--xid=a", steps=3)
  assert run_command(cli.main, "factorized", "train", entry.run, entry.check, argv) == 0
  assert seen == [False, True, True]

  monkeypatch.setattr(train_lib, "make_train_step", lambda *a: 1 / 0)
  argv = tiny_arguments(pictures, tmp_path, "--xid=b", steps=2)
  assert run_command(cli.main, "factorized", "train", entry.run, entry.check, argv) == 1
  assert gc.isenabled()


@pytest.mark.slow
def test_training_steps_alone_run_without_passes_that_do_not_pay(pictures, tmp_path, monkeypatch):
  """Validations are those of any other process, before the first step or after the last."""
  import tensorflow as tf

  from common import cli, train_lib, validation
  from factorized import train as entry

  seen = []
  make_step, evaluate = train_lib.make_train_step, validation.Evaluation.run
  see = lambda what: seen.append((what, _passes()))  # noqa: E731

  def _passes():
    options = tf.config.optimizer.get_experimental_options()
    return {options.get(name, True) for name in train_lib._PASSES}

  def make(*args):
    step = make_step(*args)
    return lambda *a: see("step") or step(*a)

  monkeypatch.setattr(train_lib, "make_train_step", make)
  monkeypatch.setattr(validation.Evaluation, "run", lambda *a: see("validation") or evaluate(*a))
  before = tf.config.optimizer.get_experimental_options()
  argv = tiny_arguments(pictures, tmp_path, "--xid=a", steps=3)
  assert run_command(cli.main, "factorized", "train", entry.run, entry.check, argv) == 0
  on_cpu = not tf.config.list_physical_devices("GPU")
  assert [passes for what, passes in seen if what == "step"] == 3 * [{not on_cpu}]
  assert {str(p) for what, p in seen if what == "validation"} == {"{True}"}
  assert tf.config.optimizer.get_experimental_options() == before

  with pytest.raises(ZeroDivisionError), train_lib.graph_passes():
    assert _passes() == {not on_cpu}
    raise ZeroDivisionError
  assert tf.config.optimizer.get_experimental_options() == before
  with tf.distribute.MirroredStrategy(["CPU:0"]).scope(), train_lib.graph_passes():
    assert _passes() == {True}
  monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["a GPU"])
  with train_lib.graph_passes():
    assert _passes() == {True}


@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True])
def test_the_codec_of_the_check_trains_as_one_of_its_own(
  warm, unbroken, pictures, tmp_path, monkeypatch
):
  from common import cli, train_lib
  from factorized import train as entry

  begins = []
  state = train_lib.TrainState
  monkeypatch.setattr(train_lib, "TrainState", lambda *a: begins.append(a[0]) or state(*a))
  found = []
  for xid, hands_over in (("a", True), ("b", False)):
    checked = []

    def check(unit, checked=checked, hands_over=hands_over):
      checked.append(entry.check(unit))
      return checked[0] if hands_over else None

    argv = tiny_arguments(pictures, tmp_path, f"--xid={xid}", steps=4)
    if warm:
      argv += [f"--config.train_eval_config.warm_start={unbroken.path.parent}"]
    argv += ["--config.train_eval_config.ema_decay=0.9"]
    assert run_command(cli.main, "factorized", "train", entry.run, check, argv) == 0
    assert (begins[-1] is checked[0]) == hands_over
    (path,) = (tmp_path / xid).glob("wid=*")
    found.append(_weights(runs.RunDir.open(path)))
  _assert_same_weights(*found)


@pytest.mark.slow
def test_warm_start_takes_the_weights_of_a_run(unbroken, pictures, tmp_path):
  argv = tiny_arguments(
    pictures,
    tmp_path,
    f"--config.train_eval_config.warm_start={unbroken.path.parent}",
    "--config.optimizer_config.learning_rate=0.0",
    steps=1,
  )
  assert train(argv) == 0
  start, end = _weights(unbroken), _weights(_only_run(tmp_path))
  kernels = [k for k in start if "kernel" in k and "optimizer" not in k]
  assert len(kernels) == 6
  for k in kernels:
    np.testing.assert_array_equal(start[k], end[k])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["factorized", "mshyper"])
def test_a_warm_start_from_another_model_is_refused_in_few_words_before_anything_is_written(
  request, pictures, tmp_path, capsys, family
):
  """Another number of filters; and a synthesis of other layers under a full-size analysis."""
  fixture = {"factorized": "trained_run", "mshyper": "trained_hyperprior_run"}[family]
  source = request.getfixturevalue(fixture)
  argv = tiny_arguments(pictures, tmp_path / "x", family=family)
  if family == "mshyper":
    argv = [a for a in argv if "model_config" not in a]
    argv[argv.index("--config") + 1] = str(ROOT / "mshyper/configs/two_layer_syn2.py:tiny")
  else:
    argv += [f"--config.model_config.{k}.num_filters=7" for k in ("analysis", "synthesis")]
  argv.append(f"--config.train_eval_config.warm_start={source.path.parent}")
  capsys.readouterr()  # What the source's training said.
  assert train(argv, family) == 2
  (line,) = capsys.readouterr().err.splitlines()
  print(line)
  assert not (tmp_path / "x").exists()
  assert len(line) < 1000
  assert line.startswith("Error: train_eval_config.warm_start: ")
  assert str(source.checkpoints_dir / "step-00000006") in line
  assert re.search(r"[0-9]+ of [0-9]+ variables differ: ", line)
  assert "codec/analysis/layers/0/kernel is [" in line and line.count(" there") <= 5
  assert "model_config" in line and str(source.work_unit_file) in line


def test_help_needs_no_tensorflow():
  code = (
    "import sys; sys.argv[1:] = ['--help']\n"
    "import runpy\n"
    "try: runpy.run_module('factorized.train', run_name='__main__')\n"
    "except SystemExit as e: assert e.code == 0\n"
    "assert 'tensorflow' not in sys.modules"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "--workdir" in done.stdout


def test_jsonl_records_are_json(unbroken):
  for line in unbroken.metrics_file.read_text().splitlines():
    assert {"step", "split", "time"} <= set(json.loads(line))
