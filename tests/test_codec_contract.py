"""What every family's codec promises. A new family is one more row in FAMILIES."""

import dataclasses
import importlib

import numpy as np
import pytest
import tensorflow as tf

from common import bitstream, data, hyper, profiling, quantizers, rd
from common.bitstream import BitstreamError

# Family -> config file that it can be built small from: those whose files are our own container.
FAMILIES = {
  "factorized": "factorized/configs/bls2017.py:tiny",
  "mshyper": "mshyper/configs/mbt2018.py:tiny",
}

# And the codecs that are not their family's only one; the module is the name's first part.
CODECS = {**FAMILIES, "factorized vae": "factorized/configs/bls2017_vae.py:tiny"}

# Those whose files are somebody else's format: tests/test_ljpeg.py has the rest of their promises.
FOREIGN = {"ljpeg": "ljpeg/configs/ljpeg.py:tiny"}

SIZES = [
  (1, 1),
  (17, 33),
  *(pytest.param(s, marks=pytest.mark.slow) for s in [(7, 5), (16, 16), (1, 40), (61, 45)]),
]


@pytest.fixture(scope="module", params=list(CODECS))
def codec(request):
  return _build(request.param)


@pytest.fixture(scope="module", params=[*FAMILIES, *FOREIGN])
def every_codec(request):
  return _build(request.param)


def _build(family):
  tf.keras.utils.set_random_seed(0)
  config = hyper.load({**CODECS, **FOREIGN}[family]).get_config()
  built = importlib.import_module(f"{family.split()[0]}.codec").build(config.model_config)
  _, photograph = data.load_eval_images("sample")[0]
  built.calibrate(rd.to_batch(photograph))
  built.prepare(_calibrated(built, photograph) if family == "factorized vae" else None)
  return built


def _calibrated(codec, photograph):
  """The tables of a codec whose weights do not give them."""
  from factorized import vbq

  return vbq.build_vbq(vbq.samples_of(codec, [photograph]), lambdas=[4.0, 0.5]).arrays()


def _photo(height, width, seed=0):
  """Smooth shapes with an edge and some grain: uint8 [height, width, 3]."""
  y, x = np.mgrid[:height, :width] / 32.0
  random = np.random.default_rng(seed)
  base = 120 + 60 * np.sin(x + 0.5 * y) + 40 * (x > 1) + random.normal(0, 4, [height, width])
  return np.clip(np.stack([base, 0.8 * base + 20, 255 - base], -1), 0, 255).astype(np.uint8)


def _contents(height, width):
  random = np.random.default_rng(1)
  return {
    "photo": _photo(height, width),
    "flat": np.full([height, width, 3], 255, np.uint8),
    "noise": random.integers(0, 256, [height, width, 3], np.uint8),
    "text": (255 * (random.random([height, width, 1]) > 0.8)).astype(np.uint8).repeat(3, 2),
  }


def _own_reconstruction(codec, image):
  latents = rd.infer(codec, rd.to_batch(image))
  decoded = rd.to_image(rd.synthesize(codec, codec.rounded(latents), image.shape[:2]))
  return decoded, codec.ideal_bits(latents)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_decoded_picture_is_the_encoders_own_reconstruction(codec, size):
  for name, image in _contents(*size).items():
    decoded = codec.decompress(codec.compress(image))
    assert decoded.dtype == np.uint8 and decoded.shape == image.shape, name
    np.testing.assert_array_equal(decoded, _own_reconstruction(codec, image)[0], err_msg=name)


@pytest.mark.slow
def test_the_same_for_a_large_odd_picture(codec):
  image = _photo(511, 769)
  decoded = codec.decompress(codec.compress(image))
  np.testing.assert_array_equal(decoded, _own_reconstruction(codec, image)[0])


def test_real_bits_are_the_estimate_plus_the_header(codec):
  image = _photo(256, 384)
  real = 8 * len(codec.compress(image))
  estimate = _own_reconstruction(codec, image)[1]
  assert real < 1.005 * estimate + 8 * 60


@pytest.mark.slow
def test_photographs_cost_at_most_one_percent_more_than_the_estimate(codec):
  """They may cost less: the prior is hardly trained here, and the tables' escape symbol codes what
  it finds nearly impossible in fewer bits than its likelihood."""
  for name, image in data.load_eval_images("sample"):
    real = 8 * len(codec.compress(image))
    estimate = _own_reconstruction(codec, image)[1]
    assert estimate > 0.1 * image.shape[0] * image.shape[1]
    assert real < 1.01 * estimate, name


@pytest.mark.slow
def test_compressing_is_deterministic(every_codec):
  image = _photo(40, 56)
  assert every_codec.compress(image) == every_codec.compress(image)


@pytest.mark.slow
def test_a_batch_of_images_has_the_latents_of_each(every_codec):
  images = np.stack([_photo(48, 32, seed) for seed in range(3)])
  together = rd.infer(every_codec, tf.constant(images, tf.float32))
  for i, image in enumerate(images):
    alone = rd.infer(every_codec, rd.to_batch(image))
    for name in alone:
      np.testing.assert_allclose(together[name].loc[i], alone[name].loc[0], atol=1e-3)


def test_bits_are_one_number_an_image_and_decrease_with_less_content(every_codec):
  quiet, busy = np.full([64, 64, 3], 128, np.uint8), _contents(64, 64)["noise"]
  rounding = quantizers.make_quantizer("round")()
  x = tf.constant(np.stack([quiet, busy]), tf.float32)
  bits = sum(every_codec.code(rd.infer(every_codec, x), rounding).bits.values())
  assert bits.shape == [2] and bits[0] < bits[1]


def test_every_flipped_byte_is_refused(codec):
  data = codec.compress(_photo(40, 56))
  for position in range(len(data)):
    damaged = bytearray(data)
    damaged[position] ^= 0x55
    with pytest.raises(BitstreamError):
      codec.decompress(bytes(damaged))


def test_truncated_files_are_refused(codec):
  data = codec.compress(_photo(40, 56))
  for length in range(0, len(data), 7):
    with pytest.raises(BitstreamError):
      codec.decompress(data[:length])


def test_a_hostile_size_with_right_checksums_is_refused(codec):
  stream = bitstream.read(codec.compress(_photo(80, 100)))
  for height, width in [(8_000, 8_000), (40, 100), (1, 1)]:
    forged = bitstream.write(
      bitstream.Bitstream(
        stream.family, stream.fingerprint, height, width, stream.sections, stream.symbols_crc
      )
    )
    with pytest.raises(BitstreamError):
      codec.decompress(forged)


def test_a_hostile_size_is_refused_before_anything_is_computed_for_it(codec, monkeypatch):
  """A prior whose symbols are nearly free lets a few bytes announce a large picture."""
  if not hasattr(codec.prior, "calibrate"):
    pytest.skip("its symbols are never so cheap: tests/test_vbq.py")
  image = np.full([80, 100, 3], 128, np.uint8)
  spread = np.full(codec.prior.channels, 0.02)
  before = [v.numpy() for v in codec.prior.trainable_variables]
  try:
    codec.prior.calibrate(0 * spread, spread)
    codec.prepare()
    stream = bitstream.read(codec.compress(image))
    sections = [b"\0" for _ in stream.sections]
    forged = dataclasses.replace(stream, height=4_000, width=4_000, sections=tuple(sections))
    if hasattr(codec, "_conditions"):
      monkeypatch.setattr(codec, "_conditions", lambda symbols: pytest.fail("was computed"))
    with pytest.raises(BitstreamError):
      codec.decompress(bitstream.write(forged))
  finally:
    for variable, value in zip(codec.prior.trainable_variables, before):
      variable.assign(value)
    codec.prepare()


def test_forged_sections_with_right_checksums_are_refused_and_end_soon(codec):
  stream = bitstream.read(codec.compress(_photo(40, 56)))
  random = np.random.default_rng(0)
  section = stream.sections[0]
  forgeries = [b"", b"\xff" * 17, b"\0" + b"\xff" * 17, bytes(100), section[:-1], section + b"x"]
  for _ in range(60):
    mutated = bytearray(section)
    for _ in range(random.integers(1, 4)):
      mutated[random.integers(len(mutated))] = random.integers(256)
    forgeries.append(bytes(mutated))
  for forgery in forgeries:
    if forgery == section:
      continue
    for size in ((stream.height, stream.width), (1, 1), (200, 300)):
      forged = bitstream.Bitstream(
        stream.family,
        stream.fingerprint,
        *size,
        (forgery, *stream.sections[1:]),
        stream.symbols_crc,
      )
      with pytest.raises(BitstreamError):
        codec.decompress(bitstream.write(forged))


def test_a_wrong_number_of_sections_is_refused(codec):
  stream = bitstream.read(codec.compress(_photo(40, 56)))
  forged = bitstream.Bitstream(
    stream.family, stream.fingerprint, 40, 56, (*stream.sections, b"more"), stream.symbols_crc
  )
  with pytest.raises(BitstreamError, match="section"):
    codec.decompress(bitstream.write(forged))


@pytest.mark.slow
def test_another_models_file_is_refused(codec):
  data = codec.compress(_photo(40, 56))
  variable = codec.synthesis.variables[0]
  before = variable.numpy()
  try:
    variable.assign(before + 1e-3)
    codec.prepare()
    with pytest.raises(BitstreamError, match="decode it with the run"):
      codec.decompress(data)
  finally:
    variable.assign(before)
    codec.prepare()
  codec.decompress(data)


@pytest.mark.parametrize(
  "image",
  [np.zeros([4, 4], np.uint8), np.zeros([4, 4, 3], np.float32), np.zeros([0, 4, 3], np.uint8)],
)
def test_what_is_no_rgb_image_is_refused(every_codec, image):
  with pytest.raises(ValueError, match="uint8"):
    every_codec.compress(image)


def test_stages_are_named_and_counted(every_codec):
  costs = profiling.profile_stages(every_codec.stages())
  assert {"f", "g"} <= set(costs)
  assert all(c.flops_per_pixel > 0 and c.num_parameters > 0 for c in costs.values())


def test_prior_variables_are_some_of_the_trainable_ones(every_codec):
  trainable = {id(v) for v in every_codec.trainable_variables}
  prior = {id(v) for v in every_codec.prior_variables}
  assert prior and prior < trainable


@pytest.mark.parametrize("factor", [1, 4, 16, 64])
@pytest.mark.parametrize("size", [(1, 1), (5, 17), (16, 64), (63, 65)])
def test_padding_reflects_or_repeats_the_edge(size, factor):
  x = tf.constant(np.random.default_rng(0).normal(size=[2, *size, 3]))
  padded = rd.pad(x, factor).numpy()
  assert padded.shape[1] % factor == 0 and padded.shape[2] % factor == 0
  expected = x.numpy()
  for axis, side in ((1, size[0]), (2, size[1])):
    extra = rd.padded_size(side, factor) - side
    widths = [(0, 0)] * 4
    widths[axis] = (0, extra)
    expected = np.pad(expected, widths, mode="reflect" if extra < side else "edge")
  np.testing.assert_array_equal(padded, expected)


def test_loss_is_rate_plus_lambda_distortion():
  config = hyper.load(FAMILIES["factorized"]).get_config()
  codec = importlib.import_module("factorized.codec").build(config.model_config)
  x = tf.constant(np.stack([_photo(40, 24, s) for s in range(2)]), tf.float32)
  terms = rd.rd_terms(codec, x, 0.02, quantizers.make_quantizer("unoise")(seed=(0, 0)))
  mse = np.mean((x - terms.x_hat).numpy() ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(terms.mse, mse, rtol=1e-5)
  np.testing.assert_allclose(terms.loss, np.mean(terms.bpp + 0.02 * mse), rtol=1e-5)
  assert terms.x_hat.shape == x.shape
