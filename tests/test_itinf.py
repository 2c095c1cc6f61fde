"""Iterative inference: less loss, in a real file of the same decoder, resumable."""

import io
import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import configs
from common import cli, eval_lib, hyper, itinf_lib, quantizers, rd, results, runs
from common.codec import Coded, Latent, TrainableCodec
from factorized.codec import build
from tests.conftest import ROOT, picture, run_command


def _itinf(argv):
  from factorized import itinf as entry

  return run_command(cli.main, "factorized", "itinf", entry.run, entry.check, argv)


def _arguments(trained, pictures, experiments, *more):
  settings = {
    "data_config.dataset": str(pictures),
    "data_config.batchsize": 3,
    "train_eval_config.num_steps": 40,
    "train_eval_config.warm_start_exp_dir": str(trained.path.parent),
    "train_eval_config.warm_start_wid": 0,
  }
  overrides = [f"--config.{k}={v}" for k, v in settings.items()]
  config = str(ROOT / "factorized/configs/itinf.py:tiny")
  return ["--config", config, "--experiments_dir", str(experiments), "--xid=1", *overrides, *more]


@pytest.fixture(scope="module")
def optimised(trained_run, odd_pictures, tmp_path_factory):
  folder = tmp_path_factory.mktemp("itinf")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(configs, "RESULTS_DIR", folder / "results")
    assert _itinf(_arguments(trained_run, odd_pictures, folder / "itinf_xms")) == 0
  (path,) = (folder / "itinf_xms").glob("1/wid=*")
  return folder, runs.RunDir.open(path)


@pytest.mark.slow
def test_no_image_costs_more_than_with_the_encoder_alone_and_all_together_less(
  optimised, odd_pictures
):
  _, run = optimised
  gains = []
  for name in sorted(p.name for p in odd_pictures.iterdir()):
    facts = runs.read_json(run.path / "images" / name / "facts.json")
    gains.append(facts["loss_before"] - facts["loss_after"])
  assert min(gains) >= 0 and np.mean(gains) > 0


@pytest.mark.slow
def test_the_results_are_those_of_files_that_the_trained_codec_decodes(
  optimised, trained_run, odd_pictures
):
  folder, run = optimised
  codec, _ = eval_lib.load_codec(trained_run, build)
  (path,) = (folder / "results").glob("*/itinf/*.json")
  result = results.read(path)
  assert result.mode == "itinf" and len(result.records) == 5
  for record in result.records:
    file = (run.path / "images" / record.image / "image.ntc").read_bytes()
    assert record.num_bytes == len(file)
    decoded = codec.decompress(file)
    reconstruction = Image.open(run.path / "images" / record.image / "reconstruction.png")
    np.testing.assert_array_equal(decoded, np.asarray(reconstruction))


def test_a_folder_an_image_with_the_latents_and_the_metrics(optimised):
  _, run = optimised
  folder = run.path / "images" / "2-17x33.png"
  assert np.load(folder / "latents.npz")["y"].shape == (1, 2, 3, 6)
  lines = runs.read_jsonl(folder / "metrics.jsonl")
  assert lines[0]["step"] == 0 and lines[-1]["step"] == 39
  assert {"bpp", "mse", "temperature"} <= set(lines[0])


def _count_traces(monkeypatch):
  traces = []
  terms_of = rd.rd_terms_of

  def counted(codec, latents, x, *more):
    if not tf.executing_eagerly():
      traces.append(tuple(x.shape[1:3]))
    return terms_of(codec, latents, x, *more)

  monkeypatch.setattr(rd, "rd_terms_of", counted)
  return traces


@pytest.fixture(scope="module")
def one_shape(tmp_path_factory):
  """A folder of five pictures of 24x16."""
  folder = tmp_path_factory.mktemp("one_shape")
  for i in range(5):
    Image.fromarray(picture(24, 16, i)).save(folder / f"{i}.png")
  return folder


@pytest.mark.slow
def test_a_smaller_last_batch_needs_no_trace_of_its_own_and_the_encoder_runs_once_a_batch(
  trained_run, one_shape, tmp_path, monkeypatch
):
  """Five pictures of one shape in batches of two."""
  traces, inferred = _count_traces(monkeypatch), []
  infer = rd.infer
  monkeypatch.setattr(rd, "infer", lambda codec, x: inferred.append(len(x)) or infer(codec, x))
  monkeypatch.setattr(configs, "RESULTS_DIR", tmp_path / "results")
  more = ["--config.data_config.batchsize=2", "--config.train_eval_config.num_steps=3"]
  assert _itinf(_arguments(trained_run, one_shape, tmp_path / "x", *more)) == 0
  assert traces == [(24, 16)]  # One for three batches: 2, 2, 1.
  assert inferred == [2, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(quantizers.FOR_ITERATIVE_INFERENCE))
def test_every_method_ends_in_files_that_decode(
  method, trained_run, one_shape, tmp_path, monkeypatch
):
  monkeypatch.setattr(configs, "RESULTS_DIR", tmp_path / "results")
  more = [f"--config.itinf_config.method={method}", "--config.train_eval_config.num_steps=12"]
  more += ["--config.itinf_config.temperature_start_step=4", "--config.data_config.batchsize=2"]
  source = str(one_shape / "[01].png")
  assert _itinf(_arguments(trained_run, source, tmp_path / "x", *more)) == 0
  (path,) = (tmp_path / "x").glob("1/wid=*")
  codec, _ = eval_lib.load_codec(trained_run, build)
  for name in ("0.png", "1.png"):
    folder = path / "images" / name
    facts = runs.read_json(folder / "facts.json")
    assert facts["loss_after"] <= facts["loss_before"]
    decoded = codec.decompress((folder / "image.ntc").read_bytes())
    np.testing.assert_array_equal(decoded, np.asarray(Image.open(folder / "reconstruction.png")))
    lines = runs.read_jsonl(folder / "metrics.jsonl")
    upper = quantizers.FOR_ITERATIVE_INFERENCE[method]
    assert lines[0]["temperature"] == pytest.approx(1.0 if upper is None else upper)
    assert (lines[-1]["temperature"] < lines[0]["temperature"]) == (upper is not None)


def test_parameters_of_the_config_reach_the_method(trained_run, one_shape, tmp_path):
  overrides = {"method": "sga_ssl", "sigmoid_scale": 1.0, "temperature_upper": 0.7}
  unit = _work_unit(trained_run, one_shape, **overrides)
  itinf_lib.check(unit, build)
  config = hyper.to_config(unit.config)
  make = itinf_lib._make_quantizer(config)
  linear = quantizers.make_quantizer("sga_linear")
  v = tf.random.stateless_normal([1, 2, 3, 4], [0, 0])
  settings = dict(seed=(0, 1), temperature=0.5)
  np.testing.assert_allclose(
    make(**settings)("y", v, 0.0).rate, linear(**settings)("y", v, 0.0).rate, atol=1e-4
  )
  assert itinf_lib._temperature(config)(0) == 0.7


def _work_unit(trained, pictures, **method):
  overrides = {
    "data_config.dataset": str(pictures),
    "train_eval_config.warm_start_exp_dir": str(trained.path.parent),
    "train_eval_config.warm_start_wid": 0,
    **{f"itinf_config.{k}": v for k, v in method.items()},
  }
  file = hyper.load(str(ROOT / "factorized/configs/itinf.py:tiny"))
  return hyper.make_work_unit(file, "factorized", "itinf", None, overrides)


@pytest.mark.slow
def test_a_picture_ends_where_it_ends_alone_whatever_batch_it_is_in(trained_run, pictures):
  codec, _ = eval_lib.load_codec(trained_run, build)
  config = hyper.to_config(_work_unit(trained_run, pictures, method="sga").config)
  optimizer = itinf_lib.LatentOptimizer(codec, config, 0.01)

  def optimised(x):
    state, step = optimizer.prepare(x)
    for number in range(4):
      state, _ = step(state, x, *optimizer.scheduled(number))
    return state.loc["y"].numpy()

  images = tf.concat([rd.to_batch(picture(20, 28, i)) for i in range(3)], axis=0)
  together = optimised(images)
  for i in range(3):
    np.testing.assert_allclose(optimised(images[i : i + 1])[0], together[i], atol=2e-3)


@pytest.mark.slow
def test_weights_stay_and_a_pictures_size_does_not_change_the_steps(trained_run, pictures):
  """Gradients are those of bits: large against Adam's epsilon, whatever the number of pixels."""
  codec, _ = eval_lib.load_codec(trained_run, build)
  before = [v.numpy() for v in codec.variables]
  config = hyper.to_config(_work_unit(trained_run, pictures, method="ste").config)
  config.itinf_config.learning_rate = 0.01
  optimizer = itinf_lib.LatentOptimizer(codec, config, 0.01)
  once = rd.to_batch(picture(16, 16))
  for x in (once, tf.tile(once, [1, 8, 8, 1])):
    state, step = optimizer.prepare(x)
    moved, _ = step(state, x, *optimizer.scheduled(0))
    # Adam's first step is the learning rate, times gradient / (gradient + epsilon).
    size = np.abs(moved.loc["y"] - state.loc["y"])
    assert np.median(size) == pytest.approx(0.01, rel=1e-2)
  for variable, value in zip(codec.variables, before):
    np.testing.assert_array_equal(variable, value)


def test_the_step_of_adam_is_that_of_keras():
  variable = tf.Variable([[[[1.0, -2.0]]]])
  keras = tf.keras.optimizers.Adam(0.05, jit_compile=False)
  zeros = {"y": tf.zeros([1, 1, 1, 2])}
  state = itinf_lib._State({"y": tf.convert_to_tensor(variable)}, zeros, zeros)
  for number in range(5):
    gradient = tf.constant([[[[0.3 - 0.2 * number, 1e-7]]]])
    keras.apply_gradients([(gradient, variable)])
    state = itinf_lib._adam(state, {"y": gradient}, tf.constant(number), tf.constant(0.05))
    np.testing.assert_allclose(state.loc["y"], variable, rtol=1e-5)


class _TwoLatents(TrainableCodec):
  """A toy with a hyperprior: y is coded around a mean that is read from the quantized z."""

  downsample_factor = 8

  def infer(self, x):
    y = tf.nn.avg_pool2d(x, 4, 4, "VALID") / 8
    return {"y": Latent(y), "z": Latent(tf.nn.avg_pool2d(y, 2, 2, "VALID") + 0.3)}

  def _mean(self, z):
    return tf.repeat(tf.repeat(z, 2, axis=1), 2, axis=2) * 0.9

  def code(self, latents, quantizer):
    z = quantizer("z", latents["z"].loc, tf.fill([3], 0.25))
    mean = self._mean(z.decode)
    y = quantizer("y", latents["y"].loc, mean)
    bits = {
      "z": tf.reduce_sum(0.01 * tf.square(z.rate), axis=[1, 2, 3]),
      "y": tf.reduce_sum(tf.square(y.rate - mean), axis=[1, 2, 3]),
    }
    return Coded({"y": y.decode, "z": z.decode}, bits)

  def synthesize(self, decode):
    return tf.repeat(tf.repeat(decode["y"] * 8, 4, axis=1), 4, axis=2)

  decoder_variables = ()

  def derive_coding(self):
    return {}

  def use_coding(self, derived):
    pass

  def rounded(self, latents):
    return self.code(latents, quantizers.make_quantizer("round")()).decode

  def pack(self, latents, size):
    coded = self.code(latents, quantizers.make_quantizer("round")())
    file = io.BytesIO()
    np.savez(file, size=size, **{k: v.numpy() for k, v in coded.decode.items()})
    return file.getvalue()

  def unpack(self, data):
    arrays = dict(np.load(io.BytesIO(data)))
    size = arrays.pop("size")
    return {k: tf.constant(v) for k, v in arrays.items()}, (int(size[0]), int(size[1]))

  def stages(self):
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sga", "sga3_linear", "soft_round"])
def test_two_latents_are_optimised_through_a_mean_that_depends_on_one(
  method, trained_run, one_shape, tmp_path
):
  unit = _work_unit(trained_run, one_shape, method=method, learning_rate=0.05)
  optimizer = itinf_lib.LatentOptimizer(_TwoLatents(), hyper.to_config(unit.config), 0.05)
  batch = [(f"{i}.png", picture(20, 28, i)) for i in range(2)]
  run = runs.RunDir(tmp_path)
  records = itinf_lib._optimise_batch(
    optimizer, batch, {"0.png", "1.png"}, run, lambda at, detail: None
  )
  assert [r.image for r in records] == ["0.png", "1.png"]
  for i, (name, image) in enumerate(batch):
    facts = runs.read_json(tmp_path / "images" / name / "facts.json")
    assert facts["loss_after"] < facts["loss_before"]
    found = np.load(tmp_path / "images" / name / "latents.npz")
    start = rd.infer(optimizer.codec, rd.to_batch(image))
    for latent in ("y", "z"):
      assert found[latent].shape == start[latent].loc.shape
      assert np.abs(found[latent] - start[latent].loc).max() > 0.05, (i, latent)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_batch_ends_as_if_it_had_not_been(
  optimised, trained_run, odd_pictures, tmp_path, monkeypatch
):
  """Killed after picture 3 is written, before 4, which was in the same batch."""
  _, unbroken = optimised
  finish, finished = itinf_lib._finish, []

  def killed(optimizer, name, *more):
    if name.startswith("4-"):
      raise RuntimeError("the machine is gone")
    finished.append(name)
    return finish(optimizer, name, *more)

  monkeypatch.setattr(configs, "RESULTS_DIR", tmp_path / "results")
  with monkeypatch.context() as patch:
    patch.setattr(itinf_lib, "_finish", killed)
    assert _itinf(_arguments(trained_run, odd_pictures, tmp_path / "x")) != 0
  assert len(finished) == 4
  (path,) = (tmp_path / "x").glob("1/wid=*")
  written = {n: (path / "images" / n / "record.json").stat().st_mtime_ns for n in finished}
  runs.RunDir.open(path).write_state("REQUEUED")
  batches, optimise = [], itinf_lib._optimise_batch

  def seen(optimizer, batch, wanted, *more):
    batches.append(([name for name, _ in batch], wanted))
    return optimise(optimizer, batch, wanted, *more)

  monkeypatch.setattr(itinf_lib, "_optimise_batch", seen)
  assert _itinf(["--workdir", str(path)]) == 0
  # The batch as it was: sums over another one may differ in the last bits.
  assert batches == [(["3-33x50.png", "4-33x50.png"], {"4-33x50.png"})]
  for name, when in written.items():
    assert (path / "images" / name / "record.json").stat().st_mtime_ns == when
  for name in (*finished, "4-33x50.png"):
    folder, expected = path / "images" / name, unbroken.path / "images" / name
    assert (folder / "image.ntc").read_bytes() == (expected / "image.ntc").read_bytes()
    for latent, value in np.load(folder / "latents.npz").items():
      np.testing.assert_array_equal(value, np.load(expected / "latents.npz")[latent])
  (result,) = (tmp_path / "results").glob("*/itinf/*.json")
  assert len(json.loads(result.read_text())["records"]) == 5


@pytest.mark.slow
def test_a_restart_skips_finished_images(optimised, trained_run, odd_pictures, monkeypatch):
  folder, run = optimised
  monkeypatch.setattr(configs, "RESULTS_DIR", folder / "results")
  done = run.path / "images" / "0-1x1.png"
  unfinished = run.path / "images" / "1-7x5.png"
  before = (done / "image.ntc").stat().st_mtime_ns
  expected = (unfinished / "image.ntc").read_bytes()
  (unfinished / "record.json").unlink()
  run.write_state("REQUEUED")
  assert _itinf(["--workdir", str(run.path)]) == 0
  assert (done / "image.ntc").stat().st_mtime_ns == before
  assert (unfinished / "image.ntc").read_bytes() == expected  # Same seed, same latents.


def test_names_that_differ_only_in_blanks_keep_their_own_folders(tmp_path):
  run = runs.RunDir(tmp_path)
  names = ["a b.png", "a_b.png", "a/b.png", "a-b.png"]
  assert len({itinf_lib._folder(run, name) for name in names}) == 4


@pytest.mark.parametrize(
  "override,expected",
  [
    ("--config.train_eval_config.warm_start_exp_dir=", "Name the experiment"),
    ("--config.train_eval_config.warm_start_wid=3", "wid 3 does not name one"),
    ("--config.itinf_config.method=sgaa", "Known: danneal, sga, sga3_cosine"),
    ("--config.itinf_config.method=round", "no method of iterative inference"),
    ("--config.itinf_config.method=mixedq", "no method of iterative inference"),
    ("--config.itinf_config.sigmoid_scale=2.0", "'sigmoid_scale' belongs to: sga3_ssl, sga_ssl"),
    ("--config.itinf_config.temperature_upper=0.0", "temperature_upper is 0.0; it must be"),
    ("--config.data_config.dataset=kodac", "Unknown dataset"),
    ("--config.train_eval_config.log_metrics_every_steps=0", "log_metrics_every_steps"),
  ],
)
def test_bad_input_names_the_fix(trained_run, odd_pictures, tmp_path, capsys, override, expected):
  argv = _arguments(trained_run, odd_pictures, tmp_path / "x", override)
  assert _itinf(argv) == 2
  assert expected in capsys.readouterr().err
  assert not (tmp_path / "x").exists()
