"""Every system of this project at a size for two CPU cores: one sweep, hours not days.

    scripts/overnight.sh                  # the sweep, its evaluation, classical codecs, the report
    ./launch.py --sweep sweeps/overnight.py [:trial] [--dry_run]          # the sweep alone

Each model trains its first rate for some ten minutes on `cid22-train`, and three further rates from
its weights in a fifth of the steps. Then the latents of the pictures of Kodak and of `cid22-valid`
are optimised (SGA) for a decoder with two layers. The VAE serves all rates with one training
(`factorized.vbq_eval` quantizes it, which is no part of the sweep).

`:trial` takes a tenth of the steps: to see whether all of it runs.
"""

from collections.abc import Sequence
from typing import Any

from common import hyper

VARIANTS = ("trial",)
FIRST = 0.01
FURTHER = (0.025, 0.004, 0.0016)
SGA_RATES = 3  # Of 1 + len(FURTHER).
JPEG_LAMBDAS = (0.0025, 0.01, 0.05)
PRE_EDIT_QUALITIES = ((0.005, 30), (0.01, 50), (0.02, 70))  # rd_lambda, quality of the tables.


def get_sweep(variant: str = "") -> list[hyper.Part]:
  hyper.check_variant(variant, VARIANTS)
  share = 0.1 if variant else 1.0
  return [
    _rates("two_layer_syn2", "mshyper", "two_layer_syn2.py:small", 1_400, share),
    _rates("bls2017", "factorized", "bls2017.py:small", 2_600, share),
    _rates("mbt2018", "mshyper", "mbt2018.py:small", 1_250, share),
    _rates("two_layer_syn", "mshyper", "two_layer_syn.py:small", 1_700, share),
    _rates("jpegl", "mshyper", "jpegl.py:small", 1_700, share),
    hyper.Part(
      "factorized.train",
      "factorized/configs/bls2017_vae.py:small",
      [{"train_eval_config.num_steps": max(200, int(2_500 * share))}],
      name="vae",
    ),
    _jpeg("ljpeg", "ljpeg.py"),
    _jpeg("ljpeg-420", "ljpeg.py", subsampling="4:2:0"),
    _jpeg("ljpeg-rounding", "ljpeg.py", coefficients="round", search=""),
    _jpeg("attention", "attention.py"),
    hyper.Part("ljpeg.train", "ljpeg/configs/pre_edit.py:small", _pre_edit(), name="pre_edit"),
    _sga("kodak", share),
    _sga("cid22-valid", share),
  ]


def _rates(name: str, family: str, config: str, steps: int, share: float) -> hyper.Part:
  """The first rate from its config's start, the others from the first, gentler and shorter."""
  steps = max(200, int(steps * share))
  further = {
    "train_eval_config.num_steps": steps // 5,
    "optimizer_config.learning_rate": 5e-4,
  }
  settings = hyper.from_first(
    [
      {"model_config.rd_lambda": FIRST, "train_eval_config.num_steps": steps},
      *({"model_config.rd_lambda": rate, **further} for rate in FURTHER),
    ]
  )
  return hyper.Part(f"{family}.train", f"{family}/configs/{config}", settings, name=name)


def _jpeg(name: str, config: str, **model: Any) -> hyper.Part:
  settings = hyper.sweep("model_config.rd_lambda", list(JPEG_LAMBDAS))
  overrides = {f"model_config.{key}": value for key, value in model.items()}
  return hyper.Part("ljpeg.train", f"ljpeg/configs/{config}", settings, overrides, name=name)


def _pre_edit() -> Sequence[dict[str, Any]]:
  """The rates in the middle of the config's own sweep."""
  return [
    {
      "model_config.rd_lambda": rd_lambda,
      "model_config.tables.quality": quality,
      "model_config.pre_edit.train_qualities": (quality - 15, quality + 15),
    }
    for rd_lambda, quality in PRE_EDIT_QUALITIES
  ]


def _sga(dataset: str, share: float) -> hyper.Part:
  """Few steps with the settings of itinf.py:tiny, which are for few steps."""
  overrides = {
    "data_config.dataset": dataset,
    "data_config.batchsize": 1,
    "train_eval_config.num_steps": 40 if share == 1.0 else 10,
    "itinf_config.temperature_rate": 0.06,
    "itinf_config.temperature_start_step": 8,
  }
  return hyper.Part(
    "mshyper.itinf",
    "mshyper/configs/itinf.py:tiny",
    hyper.runs_of("two_layer_syn2", range(SGA_RATES)),
    overrides,
    name=f"two_layer_syn2-sga-{dataset}",
  )
