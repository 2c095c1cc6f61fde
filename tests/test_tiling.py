"""Tiles: what a transform needs is exact, and large pictures come out as whole ones do."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import memory
from common import data, hyper, lpips, metrics, rd, tiling, transforms
from common.layers import GDN, Conv2D, Conv2DTranspose, Pointwise, Sequential
from common.transforms_elic import Attention, ResidualBottleneck
from common.transforms_shallow import ActivatedPlusLinear, AppendOnes, DepthToSpace
from ljpeg import attention, pre_edit
from tests.conftest import picture

LAYERS = {
  "conv": Conv2D(2, 3, 5),
  "conv 9 /4": Conv2D(2, 3, 9, 4),
  "conv origin": Conv2D(2, 3, 6, 2, origin=1),
  "gaps": Conv2D(2, 3, 3, 4, origin=0),
  "up": Conv2DTranspose(2, 3, 5, 2),
  "up 1": Conv2DTranspose(2, 3, 3, 1),
  "up 18 /16": Conv2DTranspose(2, 3, 18, 16),
  "up 16 /16": Conv2DTranspose(2, 3, 16, 16),
  "up origin": Conv2DTranspose(2, 3, 7, 3, origin=1),
  "gdn": GDN(2),
  "pointwise": Pointwise(2, "leaky_relu"),
  "residual": ResidualBottleneck(2),
  "attention": Attention(2, 1),
  "ones": AppendOnes(2),
  "d2s": DepthToSpace(2, 2),
  "two branches": ActivatedPlusLinear(2, 2, 5, 2, "igdn", "conv"),
  "linear branch": ActivatedPlusLinear(2, 2, 5, 2, "igdn", "d2s"),
  "stack": Sequential([Conv2D(2, 4, 5, 2), GDN(4), Conv2D(4, 3, 5, 2, activation="relu")]),
  "stack up": Sequential([Conv2DTranspose(2, 4, 13, 8), GDN(4), Conv2DTranspose(4, 3, 5, 2)]),
  "pre-edit": pre_edit.PreEdit([4, 4, 5, 3]),
  "cnn": attention.Attention("cnn", 8),
}
for _layer in LAYERS.values():
  for _variable in _layer.trainable_variables:  # No zeros: every tap has a say.
    _random = np.random.default_rng(0)
    _variable.assign(0.1 * abs(_variable) + _random.uniform(0.01, 0.03, _variable.shape))


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_layer_needs_is_what_its_outputs_depend_on_and_no_more(name):
  layer = LAYERS[name]
  size = 96 if layer.upsample == 1 else 12
  random = np.random.default_rng(1)
  x = tf.Variable(random.uniform(0.5, 1, [1, size, 1, layer.in_channels]), dtype=tf.float32)
  with tf.GradientTape(persistent=True) as tape:
    y = layer(x)
    middle = y.shape[1] // 2
    parts = [(n, tf.reduce_sum(y[:, n] ** 2)) for n in range(middle, middle + 2 * layer.upsample)]
  for n, part in parts:
    gradient = tape.gradient(part, x)
    touched = []
    if gradient is not None:
      touched = np.flatnonzero(np.abs(gradient.numpy()).sum(axis=(0, 2, 3)))
    first, last = layer.needs(n, n)
    if len(touched):
      assert (first, last) == (touched[0], touched[-1])


def test_a_span_needs_what_its_ends_need():
  for layer in LAYERS.values():
    first, last = layer.needs(40, 47)
    assert first == layer.needs(40, 40)[0] and last == layer.needs(47, 47)[1]


@pytest.mark.parametrize("name", transforms.known_transforms())
def test_every_transform_can_be_tiled(name):
  layer = transforms.make_transform(name)
  first, last = layer.needs(1000, 1000)
  assert first < last or "Synthesis" in name


CODECS = {
  "bls2017": ("factorized", "factorized/configs/bls2017.py:tiny", {}),
  "vae": ("factorized", "factorized/configs/bls2017_vae.py:tiny", {}),
  "mbt2018": ("mshyper", "mshyper/configs/mbt2018.py:tiny", {}),
  "jpegl": ("mshyper", "mshyper/configs/jpegl.py:tiny", {"analysis.num_residual_blocks": 1}),
  "two_layer_syn": (
    "mshyper",
    "mshyper/configs/two_layer_syn.py:tiny",
    {"analysis.num_residual_blocks": 1},
  ),
  "float": ("mshyper", "mshyper/configs/two_layer_syn2.py:tiny", {"exact_coding": False}),
  "ljpeg": ("ljpeg", "ljpeg/configs/ljpeg.py:tiny", {"search": ""}),
  "ljpeg searched": ("ljpeg", "ljpeg/configs/ljpeg.py:tiny", {}),
  "ljpeg 4:2:0": ("ljpeg", "ljpeg/configs/ljpeg.py:tiny", {"subsampling": "4:2:0", "search": ""}),
  "ljpeg attention": ("ljpeg", "ljpeg/configs/attention.py", {"attention.backbone": "cnn"}),
  "ljpeg pre_edit": ("ljpeg", "ljpeg/configs/pre_edit.py", {"pre_edit.filters": (8, 8, 3)}),
}


def build(name, variant=None):
  """A codec with initial weights, and tables."""
  family, file, values = CODECS[name]
  tf.keras.utils.set_random_seed(0)
  config = hyper.load(file if variant is None else file.split(":")[0] + variant).get_config()
  hyper.set_values(config, {f"model_config.{k}": v for k, v in values.items()})
  codec = importlib.import_module(f"{family}.codec").build(config.model_config)
  _, photograph = data.load_eval_images("sample")[0]
  codec.calibrate(rd.to_batch(photograph[:256, :256]))
  derived = None
  if name == "vae":
    from factorized import vbq

    derived = vbq.build_vbq(vbq.samples_of(codec, [photograph]), lambdas=[4.0, 0.5]).arrays()
  codec.prepare(derived)
  return codec


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CODECS if n != "ljpeg searched"])
def test_tiles_give_what_the_whole_picture_gives(name, monkeypatch):
  codec = build(name)
  image = picture(331, 437)
  size = image.shape[:2]
  latents = codec.latents_of(image)
  decode = codec.rounded(latents)
  bits = codec.ideal_bits(latents)
  whole = rd.synthesize(codec, decode, size).numpy()
  monkeypatch.setattr(tiling, "PIXELS_AT_ONCE", 1 << 15)
  monkeypatch.setattr(rd, "_VALUES_AT_ONCE", 1 << 12)
  if name in ("mbt2018", "jpegl", "two_layer_syn", "float"):
    from mshyper import codec as mshyper_codec

    monkeypatch.setattr(mshyper_codec, "_HYPER_VALUES_AT_ONCE", 1 << 14)
  count = len(list(rd._synthesized(codec, decode, size)))
  assert count > 3
  if name in ("jpegl", "two_layer_syn"):  # What ELIC's tiles need around them is larger than they.
    monkeypatch.setattr(tiling, "PIXELS_AT_ONCE", 1 << 16)
    windows = list(codec.analysis_windows().values())
    assert len(list(tiling.tiles((352, 448), windows, 1 << 16))) > 1
  tiled = codec.latents_of(image)
  again = rd.infer(codec, rd.to_batch(image))
  for key, latent in latents.items():
    for a, b, c in zip(latent, tiled[key], again[key]):
      if a is not None:
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-5)
        np.testing.assert_array_equal(b, c)
  np.testing.assert_allclose(rd.synthesize(codec, decode, size), whole, atol=2e-2)
  assert codec.ideal_bits(latents) == pytest.approx(bits, rel=1e-6)
  for key, value in codec.rounded(latents).items():
    tolerance = dict(atol=0) if name != "float" else dict(atol=1e-4)
    np.testing.assert_allclose(value, decode[key], **tolerance)
  # And so the file decodes to the encoder's own reconstruction, as ever.
  decoded = codec.decompress(codec.compress(image))
  own = rd.reconstruct(codec, codec.rounded(tiled), size)
  assert decoded.shape == image.shape
  assert np.mean(np.abs(decoded.astype(int) - own)) <= codec.decoder_tolerance


@pytest.mark.parametrize("size", [(16, 16), (16, 4096), (480, 320), (1008, 16), (336, 352)])
def test_tiles_cover_every_pixel_once_within_the_bound(size):
  layer = LAYERS["stack up"]
  covered = np.zeros(size, int)
  for rows, columns in tiling.tiles(size, [layer], 1 << 14):
    covered[rows.first : rows.end, columns.first : columns.end] += 1
    assert (rows.stop - rows.begin) * (columns.stop - columns.begin) <= 1.5 * (1 << 14)
  assert np.all(covered == 1)


@pytest.mark.slow
def test_a_codec_that_cannot_be_tiled_refuses_large_pictures(monkeypatch):
  codec = build("ljpeg")
  monkeypatch.setattr(tiling, "PIXELS_AT_ONCE", 1 << 10)
  monkeypatch.setattr(tiling, "MAX_PIXELS_WHOLE", 1 << 11)
  monkeypatch.setattr(type(codec), "analysis_windows", lambda self: None)
  codec.compress(picture(32, 64))
  with pytest.raises(tiling.TooLargeError, match="cannot run in tiles"):
    codec.compress(picture(33, 64))


def test_lpips_of_a_large_picture_is_that_of_the_whole(monkeypatch):
  random = np.random.default_rng(0)
  weights = {n: 0.05 * random.normal(size=s).astype(np.float32) for n, s in lpips.shapes().items()}
  weights = {n: np.abs(w) if n.startswith("lin") else w for n, w in weights.items()}
  monkeypatch.setattr(lpips, "load", lambda: weights)
  monkeypatch.setattr(lpips, "_TILE", 64)
  for size in ((200, 331), (193, 64), (176, 177)):
    a = picture(*size)
    b = np.clip(a + random.normal(0, 8, a.shape), 0, 255).astype(np.uint8)
    whole = lpips.of_images(a, b)
    monkeypatch.setattr(lpips, "PIXELS_AT_ONCE", 1)
    assert lpips.of_images(a, b) == pytest.approx(whole, rel=1e-5)
    monkeypatch.setattr(lpips, "PIXELS_AT_ONCE", 1 << 20)


def test_metrics_are_exact_whatever_the_strips(monkeypatch):
  a, b = picture(201, 333), picture(201, 333, 1)
  before = metrics.mse(a, b)
  assert before == np.mean((a.astype(np.float64) - b) ** 2)
  monkeypatch.setattr(metrics, "_ROWS_PIXELS", 1000)
  assert metrics.mse(a, b) == before


def test_the_peak_of_memory_is_the_programs_own():
  """Not that of the process that started it, which ru_maxrss counts as well."""
  child = "from benchmarks import memory; print(memory.peak())"
  code = "import subprocess, sys; a = bytearray(2**29); "
  code += f"subprocess.run([sys.executable, '-c', {child!r}])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert 2**20 < int(done.stdout) < 2**28


@pytest.mark.slow
@pytest.mark.parametrize("config", ["mshyper/configs/mbt2018.py", "ljpeg/configs/ljpeg.py"])
def test_a_large_picture_is_evaluated_in_less_than_2_and_a_half_gb(config):
  """Full-size models: `python -m benchmarks.memory` has them all."""
  gigabytes, _ = memory.measure(config, 2048, 2048)
  assert gigabytes < 2.5


def test_a_search_refuses_pictures_that_it_has_no_memory_for(monkeypatch):
  from ljpeg import codec as ljpeg_codec

  codec = build("ljpeg searched", "")
  monkeypatch.setattr(ljpeg_codec, "MAX_SEARCH_PIXELS", 32 * 64)
  codec.compress(picture(32, 64))
  with pytest.raises(tiling.TooLargeError, match="search=''"):
    codec.compress(picture(33, 64))
