"""The learned JPEG: its pipeline is Pillow's, its rate is the file's, its trainings end in .jpg."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import configs
from common import (
  bitstream,
  checkpoints,
  data,
  eval_lib,
  hyper,
  lpips,
  quantizers,
  rd,
  results,
  runs,
)
from ljpeg import attention, codec, compress, dct, export, jpeg_file, pre_edit, rate, tables
from ljpeg import eval as evaluation
from ljpeg import train as ljpeg_train
from tests.conftest import ROOT, picture, run_command, run_entry_point, train
from tests.test_lpips import made_up_weights


def _config(file="ljpeg", variant="tiny", **changes):
  config = hyper.load(str(ROOT / f"ljpeg/configs/{file}.py:{variant}")).get_config()
  hyper.set_values(config, {f"model_config.{k}": v for k, v in changes.items()})
  return config


def _built(file="ljpeg", image=None, **changes):
  built = codec.build(_config(file, **changes).model_config)
  built.calibrate(rd.to_batch(picture(64, 96) if image is None else image))
  built.prepare()
  return built


def _photograph():
  return data.load_eval_images("sample")[1][1][:256, :384]


def _pillow(file):
  with Image.open(io.BytesIO(file)) as image:
    image.load()
    return image.format, np.array(image.convert("RGB"))


# --- The pipeline ---------------------------------------------------------------------------------


def test_zigzag_is_that_of_the_files():
  np.testing.assert_array_equal(dct.ZIGZAG, jpeg_file.ZIGZAG)
  np.testing.assert_array_equal(dct.ZIGZAG[dct.NATURAL], np.arange(64))


def test_colours_there_and_back_and_their_weights():
  x = tf.constant(np.random.default_rng(0).uniform(0, 255, [500, 3]), tf.float32)
  np.testing.assert_allclose(dct.ycc_to_rgb(dct.rgb_to_ycc(x)), x, atol=1e-3)
  np.testing.assert_allclose(
    dct.rgb_to_ycc(tf.constant([[255.0, 255, 255]]))[0], [127, 0, 0], atol=1e-3
  )
  for i, weight in enumerate(dct.COLOUR_WEIGHTS):
    unit = np.eye(3, dtype=np.float32)[i]
    change = dct.ycc_to_rgb(tf.constant(unit)) - dct.ycc_to_rgb(tf.zeros([3]))
    assert weight == pytest.approx(float(np.mean(change**2)), rel=1e-5)


def test_the_dct_is_orthonormal_and_its_first_coefficient_the_mean():
  plane = tf.constant(np.random.default_rng(0).normal(size=[2, 16, 24]), tf.float32)
  blocks = dct.to_blocks(plane)
  assert blocks.shape == [2, 2, 3, 64]
  np.testing.assert_allclose(np.sum(blocks.numpy() ** 2), np.sum(plane.numpy() ** 2), rtol=1e-5)
  np.testing.assert_allclose(dct.from_blocks(blocks), plane, atol=1e-5)
  np.testing.assert_allclose(blocks[0, 0, 1, 0], 8 * np.mean(plane[0, :8, 8:16]), atol=1e-5)
  # The first two in zigzag order: the lowest horizontal, then the lowest vertical frequency.
  ramp = tf.constant(np.arange(8.0)[None, None].repeat(8, 1), tf.float32)
  assert abs(dct.to_blocks(ramp)[0, 0, 0, 1]) > 10 * abs(dct.to_blocks(ramp)[0, 0, 0, 2])


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 95, 100])
def test_standard_tables_are_pillows(quality):
  file = io.BytesIO()
  Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
  expected = Image.open(file).quantization
  found = dct.standard_tables(quality).numpy()[:, dct.NATURAL]
  np.testing.assert_array_equal(found, [expected[0], expected[1]])


@pytest.mark.parametrize("subsampling, bound", [("4:4:4", 0.1), ("4:2:0", 0.5)])
@pytest.mark.parametrize("step", [3.0, 20.0, 60.0])
def test_reconstruction_is_pillows_up_to_integer_arithmetic(subsampling, bound, step):
  image = _photograph()
  coefficients = dct.analyse(rd.to_batch(image), subsampling)
  table = np.maximum(1, np.round(step * (1 + np.arange(64) / 64)))  # In zigzag order.
  whole = [tf.round(c / table.astype(np.float32)) for c in coefficients]
  own = dct.synthesise([w * table.astype(np.float32) for w in whole], subsampling)
  natural = [
    w.numpy()[0][..., dct.NATURAL].astype(np.int16).reshape(*w.shape[1:3], 8, 8) for w in whole
  ]
  tables = [table[dct.NATURAL].reshape(8, 8).astype(np.int64)] * 2
  file = jpeg_file.write_jpeg(natural, tables, image.shape[:2], subsampling)
  difference = np.abs(rd.to_image(own).astype(int) - _pillow(file)[1])
  assert np.mean(difference) < bound and np.max(difference) <= 4


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 16), (17, 33)])
def test_edges_are_repeated_to_the_block_grid(size):
  x = rd.to_batch(picture(*size))
  y, cb, _ = dct.analyse(x, "4:4:4")
  assert y.shape[1:3] == (-(-size[0] // 8), -(-size[1] // 8)) == cb.shape[1:3]
  back = dct.synthesise(dct.analyse(x, "4:4:4"), "4:4:4")[:, : size[0], : size[1]]
  np.testing.assert_allclose(back, x, atol=1.5)  # Planes are rounded in between.
  y, cb, _ = dct.analyse(x, "4:2:0")
  assert y.shape[1:3] == (2 * cb.shape[1], 2 * cb.shape[2])


def test_gradients_of_the_roundings():
  z = tf.constant([-1.3, -0.5, 0.2, 0.49, 2.0, 7.7])
  error = z - tf.round(z)
  expected = {
    dct.round_ste: tf.ones_like(z),
    dct.round_cubic: 3 * error**2,
    dct.round_sharp: 7 * (2 * error) ** 6,
  }
  for function, slope in expected.items():
    with tf.GradientTape() as tape:
      tape.watch(z)
      rounded = function(z)
    np.testing.assert_array_equal(rounded, tf.round(z))
    np.testing.assert_allclose(tape.gradient(rounded, z), slope, rtol=1e-5)
  many = tf.constant(np.linspace(-3, 3, 60_001), tf.float32)
  with tf.GradientTape() as tape:
    tape.watch(many)
    total = tf.reduce_mean(dct.round_sharp(many))
  assert float(tf.reduce_sum(tape.gradient(total, many))) == pytest.approx(1, abs=0.01)


def test_tables_stay_in_baselines_range_and_come_back_into_it():
  tables = dct.Tables(np.full([2, 64], 300.0))
  assert set(tables.integers().ravel()) == {255}
  tables.log_steps.assign(tf.fill([2, 64], -1.0))
  assert set(tables.integers().ravel()) == {1}
  tables.log_steps.assign(tf.fill([2, 64], 6.0))
  for sign, passes in ((1.0, True), (-1.0, False)):  # Steps go against the gradient.
    with tf.GradientTape() as tape:
      loss = sign * tf.reduce_sum(tables())
    gradient = tape.gradient(loss, tables.log_steps)
    assert bool(tf.reduce_any(gradient != 0)) == passes


def test_the_tables_gradient_is_that_of_what_training_minimises():
  """Against finite differences in which all coefficients are chosen anew."""
  image = _photograph()[:128, :128]
  built = _built(image=image, search="", **{"tables.init": "standard", "tables.quality": 40})
  x, rounding = rd.to_batch(image), quantizers.make_quantizer("round")()

  def loss(log_steps):
    built.tables.log_steps.assign(log_steps)
    return float(built.objective(x, tf.constant(0.01), rounding).loss)

  with tf.GradientTape() as tape:
    terms = built.objective(x, tf.constant(0.01), rounding)
  gradient = tape.gradient(terms.loss, built.tables.log_steps).numpy()
  start = built.tables.log_steps.numpy()
  for half in (slice(0, 6), slice(6, 28)):  # Large numbers, and small ones.
    moved = [start.copy(), start.copy()]
    moved[0][0, half] -= 0.15
    moved[1][0, half] += 0.15
    difference = (loss(moved[1]) - loss(moved[0])) / 0.3
    assert np.sum(gradient[0, half]) == pytest.approx(difference, rel=0.5, abs=0.02)


# --- The rate -------------------------------------------------------------------------------------


def _blocks(image, step):
  y, cb, cr = (tf.round(b / step) for b in dct.analyse(rd.to_batch(image), "4:4:4"))
  return y, cb, cr


def test_symbol_counts_are_those_of_the_file():
  y, _, _ = _blocks(_photograph(), 12.0)
  ac, dc = rate.symbol_counts(y.numpy())
  flat = y.numpy()[0].reshape(-1, 64)
  expected_dc, expected_ac = jpeg_file.symbols(flat.astype(np.int16)).histograms()
  np.testing.assert_array_equal(dc, expected_dc[:12])
  for run in range(16):
    for size in range(1, 11):
      assert ac[10 * run + size - 1] == expected_ac[16 * run + size]
  assert ac[160] == expected_ac[jpeg_file.EOB] and ac[161] == expected_ac[jpeg_file.ZRL]


@pytest.mark.parametrize("step", [4.0, 12.0, 40.0, 120.0])
def test_estimated_bits_are_within_four_percent_of_the_scan(step):
  image = _photograph()
  whole = _blocks(image, step)
  model = rate.RunLengthRate()
  steps = np.full(64, step, np.float32)
  model.fit(whole[0].numpy(), 0, steps)
  model.fit(np.concatenate([whole[1].numpy(), whole[2].numpy()]), 1, steps)
  estimate = sum(float(model.bits(w, min(i, 1), steps)[0]) for i, w in enumerate(whole))
  natural = [
    w.numpy()[0][..., dct.NATURAL].astype(np.int16).reshape(*w.shape[1:3], 8, 8) for w in whole
  ]
  table = np.full([8, 8], int(step))
  real = jpeg_file.plan(natural, [table, table], image.shape[:2]).scan_bits()
  assert abs(estimate / real - 1) < 0.04


@pytest.mark.slow
def test_slopes_are_what_the_next_number_costs():
  model = rate.RunLengthRate()
  random = np.random.default_rng(0)
  values = np.round(random.laplace(0, 0.8, [1, 3, 3, 64])).astype(np.float32)
  model.fit(values, 0, np.ones(64))
  steps = tf.ones([64])
  at = tf.constant(values + np.where(values < 0, -0.25, 0.25).astype(np.float32))
  with tf.GradientTape() as tape:
    tape.watch(at)
    total = tf.reduce_sum(model.bits(at, 0, steps))
  slope = tape.gradient(total, at).numpy()
  base = float(model.bits(tf.constant(values), 0, steps)[0])
  for _ in range(100):
    place = (0, random.integers(3), random.integers(3), random.integers(1, 64))
    away = values.copy()
    away[place] += -1 if values[place] < 0 else 1
    difference = float(model.bits(tf.constant(away), 0, steps)[0]) - base
    assert slope[place] * np.sign(away[place]) == pytest.approx(difference, abs=0.05)


def _costs(model, blocks, chosen, step, weight):
  """Of each of several choices for a picture's blocks."""
  bits = model.bits(tf.constant(chosen), 0, tf.fill([64], step)).numpy()
  return bits + weight * step**2 * np.sum((blocks - np.asarray(chosen)) ** 2, axis=(1, 2, 3))


def test_the_choice_is_the_best_of_all_for_short_blocks():
  """All 3^5 choices of five coefficients, in a block whose others are 0."""
  model = rate.RunLengthRate()
  random = np.random.default_rng(0)
  for _ in range(5):
    blocks = np.zeros([1, 1, 1, 64], np.float32)
    places = np.sort(random.choice(np.arange(1, 64), 5, replace=False))
    blocks[0, 0, 0, places] = random.laplace(0, 2.0, 5)
    chosen = np.zeros([3**5, 1, 1, 64], np.float32)
    for k, place in enumerate(places):
      value = blocks[0, 0, 0, place]
      upper = np.round(abs(value))
      options = np.sign(value) * np.array([upper, max(upper - 1, 0), 0.0])
      chosen[:, 0, 0, place] = options[np.arange(3**5) // 3**k % 3]
    best = np.min(_costs(model, blocks, chosen, 10.0, 0.05))
    found = model.choose(tf.constant(blocks), 0, tf.fill([64], 10.0), tf.constant(0.05))
    assert _costs(model, blocks, found, 10.0, 0.05)[0] == pytest.approx(best, rel=1e-4)


def test_the_choice_costs_less_than_rounding_and_rounds_where_bits_are_free():
  y, _, _ = (b / 12.0 for b in dct.analyse(rd.to_batch(_photograph()), "4:4:4"))
  model = rate.RunLengthRate()
  model.fit(y.numpy(), 0, np.full(64, 12.0))
  chosen = model.choose(y, 0, tf.fill([64], 12.0), tf.constant(0.01))
  assert _costs(model, y, chosen, 12.0, 0.01) < 0.97 * _costs(model, y, tf.round(y), 12.0, 0.01)
  free = model.choose(y, 0, tf.fill([64], 12.0), tf.constant(1e6))
  np.testing.assert_array_equal(free, tf.round(y))


def test_frequency_rate_is_a_distribution_and_has_gradients():
  model = rate.FrequencyRate()
  values = np.arange(-3000, 3001, dtype=np.float32)
  blocks = np.zeros([len(values), 1, 1, 64], np.float32)
  blocks[..., 3] = values[:, None, None]
  with tf.GradientTape() as tape:
    steps = tf.fill([64], 5.0)
    tape.watch(steps)
    bits = model.bits(tf.constant(blocks), 1, steps)
  others = float(model.bits(tf.zeros([1, 1, 1, 64]), 1, steps)[0])
  at_zero = float(bits[3000])
  likelihood = np.exp2(-(bits.numpy() - others)) * 2.0 ** -(others - at_zero)
  zero = 2.0 ** -(_single_zero_bits(model))
  assert np.sum(likelihood * zero) == pytest.approx(1, abs=0.02)
  assert np.all(np.isfinite(tape.gradient(bits, steps)))


def _single_zero_bits(model):
  """Bits of a zero of frequency 3, chrominance, at steps of 5."""
  scale = np.exp(model.log_scales.numpy()[1, 3]) / 5.0
  return -np.log2(np.mean(1 - np.exp(-0.5 / scale)))


def test_an_unknown_rate_model_is_named():
  with pytest.raises(ValueError, match="Known: frequency, runs"):
    rate.make_rate("huffman")


# --- The codec ------------------------------------------------------------------------------------

SIZES = [(1, 1), (7, 5), (16, 16), (17, 33), (61, 45)]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"subsampling": "4:2:0"}, {"search": ""}], ids=str)
def test_files_are_standard_and_hold_the_coefficients(changes):
  built = _built(**changes)
  for size in SIZES:
    image = picture(*size)
    latents = built.latents_of(image)
    file = built.pack(latents, size)
    assert file == built.compress(image)
    form, shown = _pillow(file)
    assert form == "JPEG" and shown.shape == image.shape
    np.testing.assert_array_equal(built.decompress(file), shown)
    decode, unpacked_size = built.unpack(file)
    assert unpacked_size == size
    rounded = built.rounded(latents)
    for name in codec.LATENTS:
      rows, cols = decode[name].shape[1:3]
      np.testing.assert_array_equal(decode[name], rounded[name][:, :rows, :cols], err_msg=name)
    own = rd.to_image(rd.synthesize(built, rounded, size))
    assert np.mean(np.abs(own.astype(int) - shown)) <= built.decoder_tolerance, size


def test_tables_in_the_file_are_the_learned_ones():
  built = _built()
  built.tables.log_steps.assign(np.log(np.arange(3, 131)).reshape(2, 64).astype(np.float32))
  built.prepare()
  found = Image.open(io.BytesIO(built.compress(picture(16, 16)))).quantization
  np.testing.assert_array_equal(found[0], np.arange(3, 67)[dct.NATURAL])
  np.testing.assert_array_equal(found[1], np.arange(67, 131)[dct.NATURAL])


def test_what_is_no_jpeg_or_truncated_or_of_other_tables_is_refused():
  built = _built()
  file = built.compress(_photograph())
  for broken in (b"", b"\xff\xd8", file[: len(file) // 2], b"\x89PNG" + file):
    with pytest.raises(bitstream.BitstreamError):
      built.decompress(broken)
    with pytest.raises(bitstream.BitstreamError):
      built.unpack(broken)
  other = io.BytesIO()
  Image.fromarray(picture(16, 16)).save(other, "JPEG", subsampling=0)
  assert built.decompress(other.getvalue()).shape == (16, 16, 3)
  with pytest.raises(bitstream.BitstreamError, match="other tables"):
    built.unpack(other.getvalue())


def test_the_search_costs_less_than_rounding():
  image = _photograph()
  costs = {}
  for search in ("", "default"):
    built = _built(image=image, coefficients="round" if not search else "rdo", search=search)
    file = built.compress(image)
    mse = np.mean((built.decompress(file).astype(float) - image) ** 2)
    costs[search] = 8 * len(file) / (image.shape[0] * image.shape[1]) + 0.01 * mse
  assert costs["default"] < 0.95 * costs[""]


def test_objectives_are_the_two_losses():
  x = rd.to_batch(picture(40, 56))
  rounding = quantizers.make_quantizer("round")()
  ours = _built().objective(x, 0.02, rounding)
  assert float(ours.loss) == pytest.approx(float(ours.bpp[0] + 0.02 * ours.mse[0]), rel=1e-5)
  built = _built(variant="tiny_seed")
  seeds = built.objective(x, 0.02, rounding)
  inverse = np.sum(1.0 / built.tables.integers())
  assert float(seeds.loss) == pytest.approx(0.02 * float(seeds.mse[0]) + inverse, rel=1e-5)
  assert seeds.x_hat.shape == x.shape


def test_lpips_is_part_of_the_loss_and_needs_its_weights(tmp_path, monkeypatch):
  monkeypatch.setattr(configs, "LPIPS_WEIGHTS", tmp_path / "nothing.npz")
  monkeypatch.setattr(configs, "LPIPS_WEIGHTS_IS_SET", True)
  built = _built(variant="tiny_lpips")
  x = rd.to_batch(picture(40, 56))
  built.prepare()
  assert built.compress(picture(40, 56))  # Needs none.
  with pytest.raises(lpips.LpipsError, match=r"python -m common\.lpips_weights"):
    built.objective(x, 0.02, quantizers.make_quantizer("round")())
  config = hyper.load(str(ROOT / "ljpeg/configs/ljpeg.py:tiny_lpips"))
  with pytest.raises(lpips.LpipsError, match=r"python -m common\.lpips_weights"):
    ljpeg_train.check(hyper.make_work_unit(config, "ljpeg", "train"))
  monkeypatch.setattr(lpips, "load", made_up_weights)
  terms = built.objective(x, 0.02, quantizers.make_quantizer("round")())
  distortion = terms.mse[0] + 500.0 * terms.parts["lpips"]
  assert float(terms.parts["lpips"]) > 0
  assert float(terms.loss) == pytest.approx(float(terms.bpp[0] + 0.02 * distortion), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", dct.ROUNDINGS)
@pytest.mark.parametrize("name", ["runs", "frequency"])
def test_every_rounding_and_rate_gives_the_tables_finite_gradients(rounding, name):
  built = _built(rounding=rounding, rate=name, coefficients="round", search="")
  x = rd.to_batch(picture(40, 56))
  with tf.GradientTape() as tape:
    quantizer = quantizers.make_quantizer("unoise")(seed=(0, 0))
    terms = built.objective(x, 0.02, quantizer, seed=tf.constant([0, 0]))
  gradients = tape.gradient(terms.loss, built.trainable_variables)
  assert all(g is not None and np.all(np.isfinite(tf.convert_to_tensor(g))) for g in gradients)
  by_name = {v.name: tf.convert_to_tensor(g) for v, g in zip(built.trainable_variables, gradients)}
  (tables,) = (g for n, g in by_name.items() if "log_steps" in n)
  assert np.count_nonzero(tables) > 30


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"subsampling": "4:1:1"}, "4:4:4"),
    ({"rounding": "soft"}, "cubic"),
    ({"coefficients": "trellis"}, "rdo"),
    ({"loss": "mse"}, "weights"),
    ({"rate": "frequency"}, "needs model_config.rate='runs'"),
    ({"search": "long"}, "'best'"),
    ({"attention.backbone": "cnn"}, "does not go with attention"),
    ({"attention.backbone": "resnet", "search": ""}, "alexnet, cnn, vgg19"),
    ({"tables.init": "zeros"}, "flat, standard"),
    ({"tables.init": "standard", "tables.quality": 101}, "1 to 100"),
    ({"pre_edit.filters": (4, 4), "search": ""}, "3 channels"),
  ],
)
def test_settings_that_cannot_be_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    codec.build(_config(**changes).model_config)


# --- Networks before the rounding -----------------------------------------------------------------


def test_attention_starts_near_one_and_scales_the_coefficients():
  built = _built("attention")
  x = rd.to_batch(picture(40, 56))
  steps = built.tables()
  divided, factors = built._divided(x, steps)
  assert factors.shape == [1, 5, 7, 128]
  assert np.min(factors) > 0.9 and np.max(factors) < 1
  plain = dct.analyse(x, "4:4:4")
  np.testing.assert_allclose(
    divided["cr"], plain[2] / steps[1] * factors[..., 64:], rtol=1e-4, atol=1e-4
  )
  built.attention.head.bias.assign(tf.fill([128], -50.0))
  assert len(built.compress(picture(40, 56))) < 700  # Nothing but headers is left.


def test_the_fixed_backbone_has_one_cell_a_block_and_is_not_trained(monkeypatch):
  monkeypatch.setattr(lpips, "load", made_up_weights)
  built = attention.Attention("alexnet")
  assert built(tf.zeros([1, 24, 40, 3])).shape == [1, 3, 5, 128]
  assert len(built.trainable_variables) == 2


@pytest.mark.slow
def test_pre_edit_starts_as_the_identity_and_normalises_with_moving_averages():
  built = pre_edit.PreEdit([4, 4, 6, 3])
  x = rd.to_batch(picture(24, 40))
  np.testing.assert_allclose(built(x), x, atol=1e-3)
  assert len(built.units) == 2
  norm = pre_edit.BatchNorm(4)
  values = tf.constant(np.random.default_rng(0).normal(3, 2, [4, 8, 8, 4]), tf.float32)
  trained = norm(values, training=True)
  np.testing.assert_allclose(np.mean(trained, axis=(0, 1, 2)), np.zeros(4), atol=1e-3)
  for _ in range(1000):
    norm(values, training=True)
  np.testing.assert_allclose(norm(values), trained, atol=1e-2)


def test_pre_edit_draws_a_quality_for_each_training_step():
  built = _built("pre_edit")
  low, high = (float(np.mean(dct.standard_tables(q))) for q in (95, 5))
  drawn = [float(np.mean(built._steps(tf.constant([0, step])))) for step in range(20)]
  assert len(set(drawn)) > 10 and low <= min(drawn) and max(drawn) <= high
  assert drawn[3] == float(np.mean(built._steps(tf.constant([0, 3]))))
  np.testing.assert_array_equal(built._steps(None), built.tables())


# --- Runs -----------------------------------------------------------------------------------------


def _arguments(pictures, experiments, *more, file="ljpeg", steps=6):
  settings = {
    "train_data_config.dataset": str(pictures),
    "train_data_config.patchsize": 32,
    "train_data_config.batchsize": 2,
    "train_data_config.val_split": 0.4,
    "val_data_config.patchsize": 32,
    "val_data_config.batchsize": 2,
    "train_eval_config.num_steps": steps,
    "train_eval_config.checkpoint_every_steps": 2,
    "train_eval_config.eval_every_steps": 3,
    "train_eval_config.log_metrics_every_steps": 1,
  }
  overrides = [f"--config.{k}={v}" for k, v in settings.items()]
  config = str(ROOT / f"ljpeg/configs/{file}.py:tiny")
  return ["--config", config, "--experiments_dir", str(experiments), *overrides, *more]


@pytest.fixture(scope="module")
def tables_run(pictures, tmp_path_factory):
  experiments = tmp_path_factory.mktemp("ljpeg")
  assert train(_arguments(pictures, experiments, "--xid", "1"), "ljpeg") == 0
  (path,) = experiments.glob("1/wid=*")
  return runs.RunDir.open(path)


def _weights(run):
  step = checkpoints.Checkpoints(run.checkpoints_dir).latest()
  prefix = str(run.checkpoints_dir / f"step-{step:08d}" / "state")
  return {n: tf.train.load_variable(prefix, n) for n, _ in tf.train.list_variables(prefix)
          if "OBJECT_GRAPH" not in n}  # fmt: skip


@pytest.mark.slow
def test_a_training_moves_the_tables_and_logs_its_parts(tables_run):
  records = runs.read_jsonl(tables_run.metrics_file)
  assert {"loss", "bpp", "mse", "sum_of_inverse_steps"} <= set(records[0])
  log_steps = [
    v for n, v in _weights(tables_run).items() if n.startswith("codec/tables/log_steps/.A")
  ]
  assert len(log_steps) == 1 and np.ptp(log_steps[0]) > 0.05


@pytest.mark.slow
def test_a_training_leaves_its_tables_for_the_command(tables_run, tmp_path):
  loaded, _ = eval_lib.load_codec(tables_run, codec.build)
  path = tables.load(tables_run.path / "tables.json")
  (point,) = path.points
  np.testing.assert_array_equal(point.luma, loaded._written_tables[0])
  np.testing.assert_array_equal(point.chroma, loaded._written_tables[1])
  assert export.TABLES_FILE == compress.TABLES_FILE
  assert point.lambda_ == pytest.approx(3 / 0.01) and path.subsampling == "4:4:4"
  out = tmp_path / "joined.json"
  export.main([str(tables_run.path.parent), str(out)])
  np.testing.assert_array_equal(tables.load(out).points[0].luma, point.luma)
  with pytest.raises(tables.TablesError, match="train one"):
    export.join(tmp_path)
  Image.fromarray(picture(40, 56)).save(tmp_path / "photo.png")
  argv = ["compress", str(tmp_path / "photo.png"), str(tmp_path / "photo.jpg")]
  assert run_command(evaluation.main, [*argv, "--workdir", str(tables_run.path)]) == 0
  assert _pillow((tmp_path / "photo.jpg").read_bytes())[0] == "JPEG"


@pytest.mark.slow
def test_a_resumed_training_ends_with_the_same_weights(tables_run, tmp_path):
  import shutil

  copied = tmp_path / "1" / tables_run.path.name
  shutil.copytree(tables_run.path, copied)
  run = runs.RunDir.open(copied)
  ckpts = checkpoints.Checkpoints(run.checkpoints_dir)
  for step in [s for s in ckpts.steps() if s > 3]:
    shutil.rmtree(ckpts.path(step))
  run.write_state("RUNNING")
  assert train(["--workdir", str(copied)], "ljpeg") == 0
  expected, found = _weights(tables_run), _weights(run)
  assert expected.keys() == found.keys()
  for name in expected:
    np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.slow
def test_evaluation_measures_standard_files(tables_run, odd_pictures, tmp_path):
  path = eval_lib.evaluate(
    tables_run, codec.build, str(odd_pictures), results_dir=tmp_path, save_dir=tmp_path / "saved"
  )
  result = results.read(path)
  assert len(result.records) == 5
  for record in result.records:
    file = tmp_path / "saved" / record.image.replace(".png", ".jpg")
    assert file.stat().st_size == record.num_bytes
    form, shown = _pillow(file.read_bytes())
    assert form == "JPEG"
    np.testing.assert_array_equal(shown, np.array(Image.open(file.with_suffix(".png"))))
    assert 0 < record.bpp_estimated < record.bpp


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sga", "search"])
def test_iterative_inference_ends_in_jpeg_files(
  tables_run, pictures, tmp_path, monkeypatch, method
):
  monkeypatch.setattr(configs, "RESULTS_DIR", tmp_path / "results")
  argv = [
    "--config", str(ROOT / "ljpeg/configs/itinf.py:tiny"), "--experiments_dir", str(tmp_path / "i"),
    f"--config.data_config.dataset={pictures}/0.png", "--config.train_eval_config.num_steps=40",
    f"--config.train_eval_config.warm_start_exp_dir={tables_run.path}",
    f"--config.itinf_config.method={method}",
  ]  # fmt: skip
  assert run_entry_point("ljpeg", "itinf", argv) == 0
  (file,) = tmp_path.glob("i/*/wid=*/images/*/image.jpg")
  form, shown = _pillow(file.read_bytes())
  assert form == "JPEG" and shown.shape == (48, 64, 3)
  facts = runs.read_json(file.parent / "facts.json")
  assert facts["loss_after"] < facts["loss_before"]
  (result,) = (tmp_path / "results").glob("*/itinf/*.json")
  assert runs.read_json(result)["records"][0]["num_bytes"] == file.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("file", ["attention", "pre_edit"])
def test_the_other_configs_train_and_give_standard_files(file, pictures, tmp_path):
  assert train(_arguments(pictures, tmp_path, "--xid", "1", file=file, steps=4), "ljpeg") == 0
  (path,) = tmp_path.glob("1/wid=*")
  loaded, step = eval_lib.load_codec(runs.RunDir.open(path), codec.build)
  assert step == 4
  record, decoded = eval_lib.record(loaded, "0", picture(45, 61), "bitstream")
  assert decoded.shape == (45, 61, 3) and record.bpp_estimated < record.bpp


@pytest.mark.parametrize("file", ["ljpeg", "attention", "pre_edit"])
def test_sweeps_and_variants_expand(file):
  loaded = hyper.load(str(ROOT / f"ljpeg/configs/{file}.py"))
  units = hyper.expand(loaded, "ljpeg", "train")
  assert len(units) >= 6 and len({u.runname for u in units}) == len(units)
  for unit in units:
    codec.build(hyper.to_config(unit.config).model_config)


@pytest.mark.slow
def test_a_tiny_training_of_photographs_lowers_the_loss(pictures, tmp_path):
  argv = _arguments(pictures, tmp_path, "--xid", "1", steps=12)
  assert train([*argv, "--config.model_config.rd_lambda=0.05"], "ljpeg") == 0
  (path,) = tmp_path.glob("1/wid=*")
  values = [r for r in runs.read_jsonl(path / "metrics.jsonl") if r["split"] == "val"]
  assert values[-1]["loss"] < values[0]["loss"]
