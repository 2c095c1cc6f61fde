"""Training options: each does what its config comment says, and a kill changes nothing."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from common import checkpoints, hyper, precision, runs, train_lib, train_options
from common.averages import Averages
from common.early_stopping import EarlyStopping, Stopped
from common.layers import GDN, Conv2D, Conv2DTranspose, Sequential
from tests import test_distribution as distributed
from tests.conftest import ROOT, TINY_MODELS, tiny_arguments, train
from tests.test_training import _assert_same_weights, _only_run, _weights

OPTION = "--config.train_eval_config."


def _run(argv, folder, family="factorized"):
  assert train(argv, family) == 0
  return _only_run(folder)


def _copy(run, folder):
  copied = folder / "1" / run.path.name
  shutil.copytree(run.path, copied)
  return runs.RunDir.open(copied)


def _records(run, split):
  return [r for r in runs.read_jsonl(run.metrics_file) if r["split"] == split]


# --- Fields --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", distributed.TRAINING_CONFIGS)
def test_every_training_config_has_the_options_at_their_defaults(file):
  config = hyper.plain(hyper.load(str(ROOT / file)).get_config())
  assert config["test_data_config"] == train_options.DEFAULTS["test_data_config"]
  for key, default in train_options.DEFAULTS["train_eval_config"].items():
    assert config["train_eval_config"][key] == default, key


@pytest.mark.parametrize(
  "override,expected",
  [
    (OPTION + "early_stopping_patience=0", "of 1 or more, or None"),
    (OPTION + "ema_decay=1", "below 1"),
    (OPTION + "ema_decay=0.0", "above 0"),
    (OPTION + "ema_decay=nan", "ema_decay"),
    (OPTION + "precision_policy=float16", "Known: float32, mixed_float16, mixed_bfloat16"),
    (OPTION + "check_numerics=maybe", "check_numerics"),
    (OPTION + "warm_start_partial=maybe", "warm_start_partial"),
    (OPTION + "warm_start_rescale=maybe", "warm_start_rescale"),
    ("--config.optimizer_config.rates_by_size=maybe", "rates_by_size"),
    ("--config.test_data_config.dataset=kodac", "kodak"),
    ("--config.test_data_config.batchsize=0", "test_data_config.batchsize is 0"),
    ("--config.test_data_config.patchsize=0", "test_data_config.patchsize is 0"),
    ("--config.test_data_config.max_images=0", "test_data_config.max_images is 0"),
  ],
)
def test_a_value_out_of_range_names_the_fix_before_anything_is_written(
  pictures, tmp_path, capsys, override, expected
):
  assert train([*tiny_arguments(pictures, tmp_path / "x"), override]) == 2
  error = capsys.readouterr().err
  assert expected in error and "Traceback" not in error
  assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
  "overrides,expected",
  [
    (["early_stopping_patience=2", "../train_data_config.val_split=None"], "val_split"),
    (["early_stopping_patience=2", "keep_best=False"], "keep_best=True"),
    (["check_numerics=True", "precision_policy=mixed_float16"], "mixed_bfloat16"),
    (["warm_start_rescale=True"], "set warm_start, and warm_start_partial=False"),
  ],
)
def test_options_that_do_not_fit_each_other_are_refused(
  pictures, tmp_path, capsys, overrides, expected
):
  argv = [(OPTION + o).replace("train_eval_config.../", "") for o in overrides]
  assert train([*tiny_arguments(pictures, tmp_path / "x"), *argv]) == 2
  assert expected in capsys.readouterr().err
  assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_run_of_an_older_version_without_the_fields_goes_on(trained_run, pictures, tmp_path):
  run = _copy(trained_run, tmp_path)
  record = json.loads(run.work_unit_file.read_text())
  config = record["work_unit"]["config"]
  del config["test_data_config"]
  for key in train_options.DEFAULTS["train_eval_config"]:
    del config["train_eval_config"][key]
  run.work_unit_file.write_text(json.dumps(record))
  shutil.rmtree(run.checkpoints_dir / "step-00000006")
  run.write_state("RUNNING")
  assert train(tiny_arguments(pictures, tmp_path, "--xid", "1")) == 0  # The command that began it.
  _assert_same_weights(_weights(trained_run), _weights(run))


# --- Early stopping ------------------------------------------------------------------------------


def _early(folder, losses, patience=2, saved=None, start=100):
  """A run with these validation losses by step, and checkpoints of some of the steps."""
  run = runs.RunDir(folder)
  ckpts = checkpoints.Checkpoints(run.checkpoints_dir, max_to_keep=99)
  for step in saved or losses:
    ckpts.save(tf.train.Checkpoint(step=tf.Variable(step)), step)
  for step, loss in losses.items():
    runs.append_jsonl(run.metrics_file, {"split": "val", "step": step, "loss": loss})
  early = EarlyStopping(run, ckpts, patience)
  early.resume(start)
  return run, ckpts, early


@pytest.mark.parametrize(
  "losses,stops",
  [
    ([], False),
    ([5.0, 4.0, 3.0], False),
    ([5.0, 4.0, 4.5], False),
    ([5.0, 4.0, 4.5, 4.1], True),
    ([5.0, 4.0, 4.0, 4.0], True),  # The same again is no better.
    ([5.0, 4.0, 4.5, 3.9], False),
    ([5.0, float("nan"), float("nan")], True),
  ],
)
def test_it_stops_after_so_many_evaluations_without_a_better_loss(tmp_path, losses, stops):
  _, _, early = _early(tmp_path, {10 * (i + 1): loss for i, loss in enumerate(losses)})
  assert early.is_exhausted() == stops


def test_records_of_a_lost_attempt_beyond_the_restored_step_count_for_nothing(tmp_path):
  _, ckpts, early = _early(tmp_path, {10: 4.0, 20: 4.5, 30: 4.6}, start=20)
  assert not early.is_exhausted()
  early.note(30, 3.0)
  assert not early.is_exhausted()
  ckpts.mark_best(30, 1.0)  # Of the lost attempt.
  early.resume(20)
  assert ckpts.best() == {"step": 10, "loss": 4.0}


def test_the_best_checkpoint_becomes_the_newest_and_a_kill_on_the_way_changes_nothing(tmp_path):
  losses = {10: 4.0, 20: 3.0, 30: 3.5, 40: 3.6}
  run, ckpts, early = _early(tmp_path, losses, saved=[10, 20, 25, 30, 40])
  assert early.stopped() is None
  runs.write_json(run.stopped_file, {"step": 40, "best_step": 20, "loss": 3.0})  # Killed here.
  shutil.rmtree(ckpts.path(30))  # And in the middle of it.
  assert early.stopped() == Stopped(40, 20, 3.0) and ckpts.steps() == [10, 20]
  assert ckpts.latest() == ckpts.best()["step"] == 20
  assert early.stopped() == Stopped(40, 20, 3.0)


def test_where_the_best_checkpoint_is_damaged_the_next_best_is_restored(tmp_path):
  run, ckpts, early = _early(tmp_path, {10: 4.0, 20: 3.0, 30: 3.5, 40: 3.6})
  next(ckpts.path(20).glob("*.data-*")).write_bytes(b"")
  assert early.finish(40) == Stopped(40, 30, 3.5)
  assert ckpts.latest() == ckpts.best()["step"] == 30
  next(ckpts.path(30).glob("*.data-*")).write_bytes(b"")  # Training finds its way there again.
  assert early.stopped() is None and not run.stopped_file.exists()


# A learning rate at which the loss jumps up and down: within 200 steps it gets no better twice.
PATIENT = [
  "--config.optimizer_config.learning_rate=0.05",
  "--config.optimizer_config.schedule=constant",
  OPTION + "eval_every_steps=2",
  OPTION + "early_stopping_patience=2",
  OPTION + "ema_decay=0.5",
]


@pytest.fixture(scope="module")
def stopped_run(pictures, tmp_path_factory):
  """A run that stopped early, with averages and a test at its end."""
  folder = tmp_path_factory.mktemp("stopped")
  argv = tiny_arguments(pictures, folder, "--xid", "1", *PATIENT, *_test_data(pictures), steps=200)
  return _run(argv, folder)


def _test_data(pictures):
  values = {"dataset": pictures, "batchsize": 2, "patchsize": 32}
  return [f"--config.test_data_config.{k}={v}" for k, v in values.items()]


@pytest.mark.slow
def test_a_run_that_stops_early_ends_done_with_its_best_checkpoint(stopped_run):
  state = stopped_run.read_state()
  validated = {r["step"]: r["loss"] for r in _records(stopped_run, "val")}
  best = min(validated, key=validated.get)
  assert state["state"] == "DONE" and state["num_steps"] == 200
  assert state["step"] == max(validated) == best + 4 < 200
  text = f"stopped early at step {best + 4}, best step {best}, loss {validated[best]:.4f}"
  assert state["detail"].startswith(text) and "; test: loss " in state["detail"]
  assert text in stopped_run.log_file.read_text()
  ckpts = checkpoints.Checkpoints(stopped_run.checkpoints_dir)
  assert ckpts.latest() == ckpts.best()["step"] == best


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["decision", "record", "dropping", "test", "end mark"])
def test_a_kill_while_it_stops_ends_in_the_same_state(stopped_run, tmp_path, monkeypatch, moment):
  """The run once more from its best checkpoint, and killed at some moment of its end."""
  run = _copy(stopped_run, tmp_path)
  run.write_state("RUNNING")
  run.stopped_file.unlink()
  lines = run.metrics_file.read_text().splitlines(keepends=True)
  run.metrics_file.write_text("".join(x for x in lines if json.loads(x)["split"] != "test"))
  victim = {
    "decision": (EarlyStopping, "finish"),
    "record": (EarlyStopping, "_keep"),
    "dropping": (checkpoints.Checkpoints, "drop_after"),
    "test": (train_lib._Training, "_test"),
    "end mark": (train_lib.Job, "done"),
  }[moment]

  def die(*args, **kwargs):
    raise SystemExit(9)

  with monkeypatch.context() as patch:
    patch.setattr(*victim, die)
    assert train(["--workdir", str(run.path)]) == 9
  assert run.read_state()["state"] == "RUNNING"
  assert train(["--workdir", str(run.path)]) == 0
  for fact in ("state", "step", "num_steps", "detail"):
    assert run.read_state()[fact] == stopped_run.read_state()[fact]
  names = lambda r: sorted(p.name for p in r.checkpoints_dir.iterdir())  # noqa: E731
  assert names(run) == names(stopped_run)
  assert run.stopped_file.read_bytes() == stopped_run.stopped_file.read_bytes()
  _assert_same_weights(_weights(stopped_run), _weights(run))
  (test,), (expected,) = _records(run, "test"), _records(stopped_run, "test")
  assert {**test, "time": 0} == {**expected, "time": 0}


# --- The test at the end -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_test_measures_the_final_weights_as_validation_does(stopped_run, pictures):
  """The best weights, averaged: what a checkpoint's codec holds."""
  from common import eval_lib, validation
  from factorized.codec import build

  codec, step = eval_lib.load_codec(stopped_run, build)
  config = hyper.to_config(stopped_run.read_work_unit().config)
  values, _ = validation.Evaluation(codec, config, validation.test_settings(config)).run()
  (record,) = _records(stopped_run, "test")
  assert record["step"] == step
  assert {k: record[k] for k in values} == values
  assert {"loss", "bpp", "mse", "psnr_db"} == set(values)


@pytest.mark.slow
def test_the_test_data_of_the_validation_give_the_numbers_of_the_validation(pictures, tmp_path):
  argv = tiny_arguments(pictures, tmp_path, *_test_data(pictures), steps=1)
  argv += [
    "--config.train_data_config.val_split=None",
    f"--config.val_data_config.dataset={pictures}",
  ]
  run = _run(argv, tmp_path)
  (test,), (validated,) = _records(run, "test"), _records(run, "val")
  assert {**test, "time": 0} == {**validated, "time": 0, "split": "test"}
  assert f"; test: loss {test['loss']:.4f}" in run.read_state()["detail"]
  assert f"Test on {pictures}: loss {test['loss']:.4f}" in run.log_file.read_text()


@pytest.mark.slow
def test_without_test_data_nothing_is_tested(trained_run):
  assert not _records(trained_run, "test")
  assert "test" not in trained_run.read_state()["detail"]


# --- Moving averages -----------------------------------------------------------------------------


def test_averages_are_those_of_the_formula():
  random = np.random.default_rng(0)
  weights = [tf.Variable(random.normal(size=[3, 2]), dtype=tf.float32) for _ in range(2)]
  averages = Averages(weights, 0.6)
  averages.start()
  expected = [w.numpy().astype(np.float64) for w in weights]
  update = tf.function(averages.update)
  for t in range(30):
    for w in weights:
      w.assign(random.normal(size=[3, 2]))
    update(tf.constant(t))
    decay = min(0.6, (1 + t) / (10 + t))
    expected = [decay * a + (1 - decay) * w.numpy() for a, w in zip(expected, weights)]
  before = [w.numpy() for w in weights]
  with averages.in_place():
    for w, a in zip(weights, expected):
      np.testing.assert_allclose(w, a, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(before, weights)


@pytest.fixture(scope="module")
def averaged_run(pictures, tmp_path_factory):
  folder = tmp_path_factory.mktemp("averaged")
  return _run(tiny_arguments(pictures, folder, "--xid", "1", OPTION + "ema_decay=0.9"), folder)


@pytest.mark.slow
def test_training_goes_on_beside_the_averages_as_without_them(trained_run, averaged_run):
  plain, averaged = _weights(trained_run), _weights(averaged_run)
  raw = sorted(k for k in averaged if k.startswith("raw_weights/"))
  assert raw and set(averaged) - set(raw) == set(plain)
  for k in plain:
    if k.startswith("optimizers/"):
      np.testing.assert_array_equal(plain[k], averaged[k], err_msg=k)
  # Each of the raw weights is one of the run without averages; the codec's are others.
  for k in raw:
    same = [p for p in plain if p.startswith("codec/") and np.array_equal(plain[p], averaged[k])]
    assert same, k
  name = "codec/analysis/layers/0/kernel/.ATTRIBUTES/VARIABLE_VALUE"
  assert np.any(plain[name] != averaged[name])
  # Validation is of the averages.
  assert _records(averaged_run, "val")[-1]["loss"] != _records(trained_run, "val")[-1]["loss"]
  assert _records(averaged_run, "train")[-1]["loss"] == _records(trained_run, "train")[-1]["loss"]


def _resumed_like(run, tmp_path):
  """Loses the newest checkpoint of a copy, and lets it go on."""
  copied = _copy(run, tmp_path)
  shutil.rmtree(copied.checkpoints_dir / "step-00000006")
  copied.write_state("RUNNING")
  assert train(["--workdir", str(copied.path)]) == 0
  _assert_same_weights(_weights(run), _weights(copied))


@pytest.mark.slow
def test_averages_resume_exactly(averaged_run, tmp_path):
  _resumed_like(averaged_run, tmp_path)


# --- Mixed precision -----------------------------------------------------------------------------


def _layers():
  tf.keras.utils.set_random_seed(1)
  return Sequential(
    [
      Conv2D(3, 64, 5, 2, activation="leaky_relu"),
      GDN(64),
      Conv2D(64, 64, 5, 2),
      Conv2D(64, 8, 1),
      Conv2DTranspose(8, 64, 5, 2),
      GDN(64, inverse=True),
      Conv2DTranspose(64, 3, 5, 2),
    ]
  )


def _gradients(model, x, policy):
  with tf.GradientTape() as tape:
    with precision.computing_in(policy):
      y = model(x)
    loss = tf.reduce_mean(tf.square(y - x))
  return y, tape.gradient(loss, model.trainable_variables)


@pytest.mark.parametrize("policy,tolerance", [("mixed_bfloat16", 0.06), ("mixed_float16", 0.01)])
def test_what_leaves_a_transform_and_its_gradients_are_float32_and_near(policy, tolerance):
  model = _layers()
  x = tf.constant(np.random.default_rng(0).normal(size=[2, 16, 16, 3]), tf.float32)
  expected, exact = _gradients(model, x, None)
  y, gradients = _gradients(model, x, policy)
  assert y.dtype == tf.float32 and {g.dtype for g in gradients} == {tf.float32}
  assert np.any(y != expected)  # Else nothing was computed in 16 bits.
  low = {"mixed_bfloat16": tf.bfloat16, "mixed_float16": tf.float16}[policy]
  assert np.mean(tf.cast(tf.cast(y, low), tf.float32) != y) > 0.5  # Its last layer was not.
  for variable, a, b in zip(model.trainable_variables, gradients, exact):
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert error < tolerance, variable.name
  np.testing.assert_array_equal(model(x), expected)  # It ended with the context.


@pytest.mark.parametrize("make,sizes", [(Conv2D, (64, 1)), (Conv2D, (64, 3)), (GDN, ())])
def test_a_layer_on_its_own_returns_what_it_was_given(make, sizes):
  layer = make(64, *sizes)
  x = tf.random.stateless_normal([1, 4, 4, 64], [1, 2])
  with precision.computing_in("mixed_bfloat16"):
    assert layer(x).dtype == tf.float32
    assert layer(tf.cast(x, tf.bfloat16)).dtype == tf.bfloat16
  assert layer(x).dtype == tf.float32


FILES = {
  **{family: file for family, (file, _) in TINY_MODELS.items()},
  "elic": "mshyper/configs/jpegl.py:tiny",
  "ljpeg": "ljpeg/configs/attention.py:tiny",
  "pre_edit": "ljpeg/configs/pre_edit.py:tiny",
}


@pytest.mark.slow
@pytest.mark.parametrize(
  "name,policy",
  # ELIC's many convolutions take a minute in a processor's float16.
  [(n, "mixed_bfloat16") for n in FILES] + [(n, "mixed_float16") for n in FILES if n != "elic"],
)
def test_every_model_trains_in_mixed_precision(name, policy):
  import importlib

  family = FILES[name].split("/")[0]
  config = hyper.load(str(ROOT / FILES[name])).get_config()
  settings = {f"model_config.{k}": v for k, v in TINY_MODELS.get(name, ("", {}))[1].items()}
  if name == "elic":
    settings = {"model_config.analysis.channels": (8, 8, 8, 320)}
  hyper.set_values(config, {**settings, "train_eval_config.precision_policy": policy})
  tf.keras.utils.set_random_seed(0)
  state = train_lib.TrainState(
    importlib.import_module(f"{family}.codec").build(config.model_config), precision_policy=policy
  )
  y, x = np.mgrid[:64, :64] / 8.0
  crop = np.stack([128 + 100 * np.sin(x + k) * np.cos(y) for k in range(3)], -1)
  crops = tf.constant(np.stack([crop] * 2).astype(np.uint8))
  codec = state.codec
  codec.calibrate(tf.cast(crops, tf.float32))
  with precision.computing_in(policy):
    terms = codec.objective(
      tf.cast(crops, tf.float32), 0.01, _noise(config), seed=tf.constant([0, 0])
    )
    latents = codec.infer(tf.cast(crops, tf.float32))
  assert {t.dtype for t in (terms.loss, terms.bpp, terms.mse, terms.x_hat)} == {tf.float32}
  assert {t.loc.dtype for t in latents.values()} == {tf.float32}
  step = train_lib.make_train_step(state, config)
  losses = [
    float(step(crops, np.int32(i), np.float32(1e-3), np.float32(0.01))["loss"]) for i in range(25)
  ]
  assert np.isfinite(losses).all()
  assert np.mean(losses[-5:]) < np.mean(losses[:5])


def _noise(config):
  from common import quantizers

  return quantizers.make_quantizer(config.model_config.quantizer)(seed=(0, 0))


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_many_good_steps(monkeypatch):
  monkeypatch.setattr(precision.LossScale, "GOOD_STEPS", 3)
  scale = precision.LossScale()
  seen = []
  for good in (False, True, True, True, True, False, False):
    scale.update(tf.constant(good))
    seen.append((float(scale.scale) / scale.INITIAL, int(scale.good_steps)))
  assert seen == [(0.5, 0), (0.5, 1), (0.5, 2), (1, 0), (1, 1), (0.5, 0), (0.25, 0)]
  scale.scale.assign(1.0)
  scale.update(tf.constant(False))
  assert float(scale.scale) == 1.0


@pytest.fixture(scope="module")
def half_run(pictures, tmp_path_factory):
  """A run in float16 whose first steps overflow: the loss scale starts far too high."""
  folder = tmp_path_factory.mktemp("half")
  before = precision.LossScale.INITIAL
  precision.LossScale.INITIAL = 2.0**40
  try:
    argv = tiny_arguments(
      pictures, folder, "--xid", "1", OPTION + "precision_policy=mixed_float16", steps=6
    )
    return _run(argv, folder)
  finally:
    precision.LossScale.INITIAL = before


@pytest.mark.slow
def test_a_step_that_overflows_is_left_out_and_logged_and_is_no_divergence(half_run):
  weights = _weights(half_run)
  assert half_run.read_state()["state"] == "DONE"
  text = half_run.log_file.read_text()
  left_out = text.count("is left out: float16 overflows")
  assert left_out >= 1
  scale = next(v for k, v in weights.items() if k.startswith("loss_scale/scale/"))
  assert scale == 2.0 ** (40 - left_out)
  iterations = [
    v for k, v in weights.items() if k.startswith("optimizers/0/_iterations/") or "iterations" in k
  ]
  assert iterations and all(i == 6 - left_out for i in iterations)


@pytest.mark.slow
def test_mixed_precision_resumes_exactly(half_run, tmp_path):
  _resumed_like(half_run, tmp_path)


@pytest.mark.slow
def test_nan_at_scale_one_is_a_divergence(pictures, tmp_path, monkeypatch):
  monkeypatch.setattr(precision.LossScale, "INITIAL", 1.0)
  argv = tiny_arguments(
    pictures,
    tmp_path,
    OPTION + "precision_policy=mixed_float16",
    "--config.optimizer_config.learning_rate=1e30",
  )
  assert train(argv) == 1
  assert "is not finite" in _only_run(tmp_path).read_state()["reason"]


@pytest.mark.slow
def test_files_do_not_depend_on_the_precision_of_the_training(pictures, tmp_path):
  """The same weights, trained either way, give the same file: coding is float32."""
  from common import eval_lib
  from factorized.codec import build
  from tests.conftest import picture

  argv = tiny_arguments(pictures, tmp_path, OPTION + "precision_policy=mixed_bfloat16", steps=1)
  run = _run(argv, tmp_path)
  first, _ = eval_lib.load_codec(run, build)
  with precision.computing_in(None):
    assert first.compress(picture(33, 40)) == eval_lib.load_codec(run, build)[0].compress(
      picture(33, 40)
    )
  assert first.infer(tf.zeros([1, 32, 32, 3]))["y"].loc.dtype == tf.float32


# --- check_numerics ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY_MODELS)
def test_check_numerics_lets_a_good_training_be(request, pictures, tmp_path, family):
  argv = tiny_arguments(pictures, tmp_path, OPTION + "check_numerics=True", steps=2, family=family)
  _run(argv, tmp_path, family)


@pytest.mark.slow
def test_check_numerics_names_the_first_operation_and_does_not_leak(
  pictures, tmp_path, monkeypatch
):
  from common import rd

  whole = rd.rd_terms_of

  def broken(*args, **kwargs):
    terms = whole(*args, **kwargs)
    return terms._replace(loss=terms.loss + 0.0 * tf.math.log(terms.bpp[0] - 1e9, name="culprit"))

  with monkeypatch.context() as patch:
    patch.setattr(rd, "rd_terms_of", broken)
    argv = tiny_arguments(pictures, tmp_path, OPTION + "check_numerics=True")
    assert train(argv) == 1
  reason = _only_run(tmp_path).read_state()["reason"]
  assert reason.startswith("DivergedError: Step 0 is not finite: ")
  assert "in Log" in reason and "culprit" in reason
  assert "tests/test_training_options.py, line " in reason and len(reason) < 400
  assert np.isnan(tf.math.log(tf.constant(-1.0)))


# --- Partial warm starts -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_partial_warm_start_takes_what_fits_and_names_the_rest(trained_run, pictures, tmp_path):
  more = [
    OPTION + "warm_start_partial=True",
    f"{OPTION}warm_start={trained_run.path}",
    "--config.optimizer_config.learning_rate=0.0",
    "--config.model_config.synthesis.num_filters=7",
  ]
  run = _run(tiny_arguments(pictures, tmp_path, *more, steps=1), tmp_path)
  start, end = _weights(trained_run), _weights(run)
  kept = [k for k in end if k.startswith("codec/analysis/")]
  assert kept
  for k in kept:
    np.testing.assert_array_equal(start[k], end[k])
  (line,) = [x for x in run.log_file.read_text().splitlines() if "Warm start from" in x]
  assert "At their initial values stay: " in line
  assert "codec/synthesis/layers/0/kernel" in line and "codec/analysis" not in line


def test_a_partial_warm_start_from_which_nothing_fits_is_refused(tmp_path):
  ckpts = checkpoints.Checkpoints(tmp_path)
  ckpts.save(tf.train.Checkpoint(codec=tf.Module(), other=tf.Variable(1.0)), 1)
  module = tf.Module()
  module.weight = tf.Variable([1.0])
  with pytest.raises(checkpoints.MisfitError, match="none of the 1 variables"):
    ckpts.restore_fitting(tf.train.Checkpoint(codec=module), 1)


# --- Warm starts for another lambda, rates by size -----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY_MODELS)
def test_a_rescaled_warm_start_begins_on_the_grid_of_its_lambda(
  request, pictures, tmp_path, family
):
  name = "trained_run" if family == "factorized" else "trained_hyperprior_run"
  source = request.getfixturevalue(name)
  more = [
    OPTION + "warm_start_rescale=True",
    f"{OPTION}warm_start={source.path}",
    "--config.optimizer_config.learning_rate=0.0",
  ]
  rd_lambda = json.loads(source.work_unit_file.read_text())["work_unit"]["config"]["model_config"][
    "rd_lambda"
  ]
  more.append(f"--config.model_config.rd_lambda={rd_lambda * 4}")
  run = _run(tiny_arguments(pictures, tmp_path, *more, steps=1, family=family), tmp_path, family)
  start, end = _weights(source), _weights(run)
  last = max(k for k in end if k.startswith("codec/analysis/layers/") and "kernel" in k)
  np.testing.assert_allclose(end[last], 2 * start[last], rtol=1e-6)
  (line,) = [x for x in run.log_file.read_text().splitlines() if "Warm start from" in x]
  assert f"Latents times 2, for rd_lambda was {rd_lambda:g} there." in line


def test_a_rescaled_warm_start_that_the_model_cannot_do_is_refused_before_its_source_trains(
  pictures,
):
  from mshyper import codec

  config = hyper.load(str(ROOT / "mshyper/configs/jpegl.py:tiny")).get_config()
  values = {"warm_start": "wid=0", "warm_start_rescale": True}
  hyper.set_values(config, {f"train_eval_config.{k}": v for k, v in values.items()})
  hyper.set_values(config, {"train_data_config.dataset": str(pictures)})
  hyper.set_values(config, {f"{d}_data_config.patchsize": 32 for d in ("train", "val")})
  unit = hyper.WorkUnit("mshyper", "train", hyper.plain(config), 1, {}, "a", "a.py")
  assert hyper.source_of(unit) == 0
  with pytest.raises(ValueError, match=r"ElicAnalysis .*warm_start_rescale=False"):
    train_lib.check(unit, codec.build)


@pytest.mark.slow
def test_rates_by_size_resume_exactly(trained_run, pictures, tmp_path):
  more = ["--xid", "1", "--config.optimizer_config.rates_by_size=True"]
  run = _run(tiny_arguments(pictures, tmp_path / "whole", *more), tmp_path / "whole")
  _resumed_like(run, tmp_path / "resumed")
  ours, plain = _weights(run), _weights(trained_run)
  (factors,) = [ours[k] for k in ours if k.startswith("rate_factors")]
  assert factors.min() < 1.0 == factors.max()
  assert any(not np.array_equal(ours[k], plain[k]) for k in plain)


# --- Several devices -----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_stop_early_together_as_two_replicas_do(pictures, tmp_path):
  more = [*PATIENT, *_test_data(pictures)]
  argv = distributed.arguments(pictures, tmp_path, "workers", "multi_worker", 200, *more)
  addresses = distributed.free_addresses()
  codes, said = distributed.finish(*[distributed.start(argv, i, addresses) for i in range(2)])
  assert codes == [0, 0], said
  more.append(OPTION + "num_replicas=2")
  argv = distributed.arguments(pictures, tmp_path, "mirrored", "mirrored", 200, *more)
  codes, said = distributed.finish(distributed.start(argv))
  assert codes == [0], said
  workers, mirrored = (distributed.run_of(tmp_path, x) for x in ("workers", "mirrored"))
  assert "stopped early" in workers.read_state()["detail"]
  assert workers.read_state()["detail"] == mirrored.read_state()["detail"]
  _assert_same_weights(_weights(workers), _weights(mirrored))
  assert len(_records(workers, "test")) == 1


@pytest.mark.slow
def test_replicas_leave_out_the_same_steps(pictures, tmp_path):
  """Float16, whose first steps overflow, with averages and rates by size."""
  code = (
    "from common import precision\n"
    "precision.LossScale.INITIAL = 2.0 ** 40\n"
    "import runpy; runpy.run_module('factorized.train', run_name='__main__')"
  )
  more = [OPTION + "num_replicas=2", OPTION + "precision_policy=mixed_float16"]
  more += [OPTION + "ema_decay=0.9", "--config.optimizer_config.rates_by_size=True"]
  argv = distributed.arguments(pictures, tmp_path, "1", "mirrored", 12, *more)
  done = subprocess.run(
    [sys.executable, "-c", code, *argv],
    cwd=ROOT,
    env={**os.environ, "NTC_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  weights = _weights(distributed.run_of(tmp_path, "1"))
  left_out = done.stderr.count("is left out: float16 overflows")
  assert left_out >= 1
  assert weights["optimizers/0/_iterations/.ATTRIBUTES/VARIABLE_VALUE"] == 12 - left_out
