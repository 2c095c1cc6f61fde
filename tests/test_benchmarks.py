"""The benchmarks' command lines, and the table of their figures; nothing is measured here."""

import importlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from benchmarks import half_hour, plain, rows, table, train_step
from common import data, hyper, results
from tests.conftest import picture

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What the specification's table asks for, row by row.
SPEC = {
  1: ("train step", "65%"),
  2: ("train step", "1.7x", "1.2x", "1.1x"),
  3: ("CompressAI", "train step", "1.5x"),
  4: ("decode", "two_layer_syn", "6x"),
  5: ("encode", "mbt2018", "1.3x"),
  6: ("range coding", "2x", "20 Msymbol/s"),
  7: ("input pipeline", "5x", "5,000"),
  8: ("itinf step", "2x"),
  9: ("VBQ", "16 lambdas", "1.0 s", "1 GB"),
  10: ("dry run", "1,000", "1 s", "no TensorFlow"),
  11: ("submitted", "1 sbatch", "2 s"),
  12: ("start of a training", "10 s"),
  13: ("memory", "2048", "4 GB"),
}
MODULES = sorted({row.module for row in rows.ROWS.values()} | {"ceilings", "half_hour", "table"})


def test_rows_are_those_of_the_specification():
  assert rows.ROWS.keys() == SPEC.keys()
  for number, words in SPEC.items():
    row = rows.ROWS[number]
    assert all(word in f"{row.what} {row.asks}" for word in words), number
    assert (ROOT / "benchmarks" / f"{row.module}.py").is_file()


@pytest.mark.parametrize("module", MODULES)
def test_help_answers_without_tensorflow(module):
  argv = [sys.executable, "-X", "importtime", "-m", f"benchmarks.{module}", "--help"]
  done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-500:]
  assert "usage:" in done.stdout and " tensorflow" not in done.stderr


def test_a_benchmark_of_several_rows_runs_once():
  options = {"dataset": "sample", "peer": "python"}
  found = table.commands([1, 2, 3, 5, 8], is_quick=True, options=options)
  assert [numbers for numbers, _ in found.values()] == [[1, 2], [3, 5], [8]]
  assert found["itinf_step"][1] == ["--dataset", "sample", "--rounds", "3"]


def test_a_figure_reaches_what_is_asked_by_its_direction():
  share = rows.Figure(1, "a", [0.7], "s", "1 s", 0.649, 0.65)
  memory = rows.Figure(13, "b", [3.0], "GB", "4 GB", 0.75, 1.0, at_least=False)
  assert not share.is_reached and memory.is_reached
  lines = rows.markdown([share, memory])
  assert lines[2].endswith("| 0.65 | >= 0.65 | no |") and lines[3].endswith("| <= 1.00 | yes |")


def test_the_table_goes_on_after_a_failure(monkeypatch, capsys):
  figure = rows.Figure(8, "a picture", [0.2, 0.1, 0.3], "s", "0.1 s", 2.0, 2.0, at_least=False)
  record = {"machine": "a machine", "ceilings": {rows.MATMUL: [200.0]}}

  def run(module, args):
    return {**record, "figures": [figure._asdict()]} if module == "itinf_step" else None

  monkeypatch.setattr(table, "run", run)
  monkeypatch.setattr(sys, "argv", ["table", "--rows", "6,8"])
  assert table.main() == 1
  out = capsys.readouterr().out
  assert "0.200 (0.100 to 0.300) s" in out and "| yes |" in out
  assert "Rows 6: benchmarks.coding failed." in out


def _convolutions(layers):
  """What each convolution and GDN of ours, or of tensorflow_compression's, is."""
  found = []
  for layer in layers:
    name = type(layer).__name__
    if name == "GDN":
      found.append(("GDN", bool(layer.inverse)))
    elif name == "SignalConv2D":
      stride = (layer.strides_down[0], layer.strides_up[0])
      has_relu = layer.activation is tf.nn.relu
      found.append((layer.kernel_support[0], stride, layer.filters, layer.use_bias, has_relu))
    else:
      stride = (layer.downsample, layer.upsample)
      has_relu = layer.activation is tf.nn.relu
      found.append((layer.kernel_size, stride, layer.out_channels, layer.use_bias, has_relu))
  return found


@pytest.mark.slow
@pytest.mark.parametrize("family,name", [("factorized", "bls2017"), ("mshyper", "mbt2018")])
def test_the_plain_model_of_the_train_step_is_the_same(family, name, monkeypatch):
  """The same layers, as many weights, and from random ones a loss of the same size."""
  config = hyper.load(f"{family}/configs/{name}.py:tiny").get_config()
  config.model_config.init, config.optimizer_config.learning_rate = "random", 1e-4
  crops = np.stack([picture(64, 64, seed) for seed in range(2)])
  ours, _ = train_step.make_step(family, config, crops)
  made = []
  trained = plain._trained
  monkeypatch.setattr(plain, "_trained", lambda *parts: made.append(parts) or trained(*parts))
  theirs = plain.make_step(config, crops, "variable")
  assert 0.25 < theirs() / ours() < 4.0
  assert np.isfinite(plain.make_step(config, crops)())  # As the table has it.

  codec = importlib.import_module(f"{family}.codec").build(config.model_config)
  assert sum(map(np.size, trained(*made[0]))) == sum(map(np.size, codec.trainable_variables))
  transforms = (getattr(codec, part, None) for part in plain._TRANSFORMS)
  for transform, model in zip(filter(None, transforms), made[0]):
    assert _convolutions(transform.layers) == _convolutions(model.layers)


@pytest.mark.parametrize("file", ["mshyper/configs/jpegl.py", "factorized/configs/bls2017_vae.py"])
def test_other_models_have_no_plain_ones(file):
  config = hyper.load(file).get_config()
  assert not plain.is_known(config)
  with pytest.raises(ValueError, match="alone"):
    plain.make_step(config, np.zeros([1, 64, 64, 3], np.uint8))


# The half hour beside CompressAI's trainer


def _peer_out(folder, pictures, rate="0.01"):
  """What benchmarks/compressai_trainer.py leaves for these pictures."""
  out = folder / rate
  out.mkdir(parents=True)
  images = []
  for i, (name, image) in enumerate(pictures.items()):
    Image.fromarray(image ^ 1).save(out / f"{name}.png")
    images.append(
      {"image": f"{name}.png", "bytes": 100 + i, "seconds_encode": 0.1, "seconds_decode": 0.2}
    )
  facts = {
    "lambda": float(rate), "minutes": 7.0, "steps": 3, "parameters": 5, "compressai": "1",
    "torch": "2", "images": images,
    "settings": {"model": "mbt2018-mean", "batch_size": 2, "learning_rate": 5e-4},
  }  # fmt: skip
  (out / "facts.json").write_text(json.dumps(facts))
  return folder


def test_what_the_peer_left_is_measured_like_all_else(tmp_path):
  pictures = {"a": picture(40, 56), "b": picture(33, 64)}
  (tmp_path / "in").mkdir()
  for name, image in pictures.items():
    Image.fromarray(image).save(tmp_path / "in" / f"{name}.png")
  images = data.load_eval_images(str(tmp_path / "in"))
  (result,) = half_hour.import_peer(_peer_out(tmp_path / "out", pictures), images, "x")
  assert [r.num_bytes for r in result.records] == [100, 101]
  for record in result.records:
    assert record.mse == pytest.approx(1.0)
    assert record.psnr_db == pytest.approx(20 * np.log10(255))
  assert result.records[0].bpp == pytest.approx(800 / (40 * 56))
  path = results.write(tmp_path / "results", result)
  assert results.read(path) == result
  with pytest.raises(SystemExit, match=r"No \*/facts.json"):
    half_hour.import_peer(tmp_path / "in", images, "x")
  del pictures["b"]
  with pytest.raises(SystemExit, match="made from others"):
    half_hour.import_peer(_peer_out(tmp_path / "less", pictures), images, "x")


def _curve(label, bpp, psnr_db):
  return results.RDCurve(label=label, bpp=bpp, psnr_db=psnr_db, source="bitstream", group=label)


def test_the_table_compares_at_equal_rates_within_what_was_measured():
  ours = _curve("ours", (0.25, 0.4, 1.0), (28.0, 30.0, 33.0))
  other = _curve("other", (0.1, 0.35, 0.5, 1.2), (20.0, 29.0, 31.0, 32.0))
  assert half_hour.psnr_at(ours, 0.4) == pytest.approx(30.0)
  assert half_hour.psnr_at(ours, 0.2) is None and half_hour.psnr_at(ours, 1.1) is None
  assert half_hour.psnr_at(ours, np.sqrt(0.4)) == pytest.approx(31.5)
  lines = half_hour.table(ours, [other])
  (row,) = [line for line in lines if line.startswith("| ours | -")]
  assert row.split(" | ")[3] == "30.00"
  (sentence,) = [line for line in lines if line.startswith("- Against other")]
  assert "higher from" in sentence and "BD-rate" in sentence
