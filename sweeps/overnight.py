"""Every system of this project at a size for two CPU cores: one sweep, a night.

    scripts/overnight.sh                  # the sweep, its evaluation, classical codecs, the report
    ./launch.py --sweep sweeps/overnight.py [:hour] [--dry_run]           # the sweep alone

Each model trains its first rate for ten to fifteen minutes on `cid22-train`, and three further
rates from its weights in a third of the steps. Then the latents of the pictures of Kodak and of
`cid22-valid` are optimised (SGA) for the smallest decoder with two layers. The VAE serves all rates
with one training (`factorized.vbq_eval` quantizes it, which is no part of the sweep).

`:hour` takes a tenth of the steps: to see whether all of it runs.
"""

from collections.abc import Sequence
from typing import Any

from common import hyper

VARIANTS = ("hour",)
FIRST = 0.016
FURTHER = (0.04, 0.0063, 0.0025)


def get_sweep(variant: str = "") -> list[hyper.Part]:
  hyper.check_variant(variant, VARIANTS)
  share = 0.1 if variant else 1.0
  return [
    _rates("bls2017", "factorized", "bls2017.py:small", 8_000, share),
    _rates("mbt2018", "mshyper", "mbt2018.py:small", 3_500, share),
    _rates("two_layer_syn2", "mshyper", "two_layer_syn2.py:small", 4_500, share),
    _rates("two_layer_syn", "mshyper", "two_layer_syn.py:small", 4_500, share),
    _rates("jpegl", "mshyper", "jpegl.py:small", 4_500, share),
    hyper.Part(
      "factorized.train",
      "factorized/configs/bls2017_vae.py:small",
      [{"train_eval_config.num_steps": max(200, int(7_000 * share))}],
      name="vae",
    ),
    _jpeg("ljpeg", "ljpeg.py", (0.0025, 0.005, 0.01, 0.02, 0.05)),
    _jpeg("ljpeg-420", "ljpeg.py", (0.0025, 0.005, 0.01, 0.02, 0.05), subsampling="4:2:0"),
    _jpeg("ljpeg-rounding", "ljpeg.py", (0.0025, 0.01, 0.05), coefficients="round", search=""),
    _jpeg("attention", "attention.py", (0.0025, 0.01, 0.05)),
    hyper.Part("ljpeg.train", "ljpeg/configs/pre_edit.py:small", name="pre_edit"),
    *_sga("kodak", share),
    *_sga("cid22-valid", share),
  ]


def _rates(name: str, family: str, config: str, steps: int, share: float) -> hyper.Part:
  """The first rate from its config's start, the others from the first, gentler and shorter."""
  steps = max(200, int(steps * share))
  further = {
    "train_eval_config.num_steps": steps // 3,
    "optimizer_config.learning_rate": 5e-4,
  }
  settings = hyper.from_first(
    [
      {"model_config.rd_lambda": FIRST, "train_eval_config.num_steps": steps},
      *({"model_config.rd_lambda": rate, **further} for rate in FURTHER),
    ]
  )
  return hyper.Part(f"{family}.train", f"{family}/configs/{config}", settings, name=name)


def _jpeg(name: str, config: str, lambdas: Sequence[float], **model: Any) -> hyper.Part:
  settings = hyper.sweep("model_config.rd_lambda", list(lambdas))
  overrides = {f"model_config.{key}": value for key, value in model.items()}
  return hyper.Part("ljpeg.train", f"ljpeg/configs/{config}", settings, overrides, name=name)


def _sga(dataset: str, share: float) -> list[hyper.Part]:
  """100 steps with the settings of itinf.py:tiny, which are for few steps."""
  overrides = {
    "data_config.dataset": dataset,
    "train_eval_config.num_steps": 100 if share == 1.0 else 20,
  }
  return [
    hyper.Part(
      "mshyper.itinf",
      "mshyper/configs/itinf.py:tiny",
      hyper.runs_of("two_layer_syn2", range(1 + len(FURTHER))),
      overrides,
      name=f"two_layer_syn2-sga-{dataset}",
    )
  ]
