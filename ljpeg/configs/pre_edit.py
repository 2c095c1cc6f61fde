"""Pre-editing before standard JPEG, the google_baseline: Talebi et al. 2020 (arXiv 2002.00113).

    python -m ljpeg.train --config ljpeg/configs/pre_edit.py
    ./launch.py --main ljpeg.train --config ljpeg/configs/pre_edit.py:small --jobs 2   (the sweep)

A residual network edits the picture; what is compressed is standard JPEG with the Independent JPEG
Group's tables. The loss is estimated bits per pixel + rd_lambda * MSE; in training the quality is
drawn for every batch, files are written at `model_config.tables.quality`.

As it stands, hours on a GPU, not measured here. `:small` costs about two minutes of one processor a
rate; measured on Kodak: from 0.64 bpp at 30.7 dB to 3.02 bpp at 40.2 dB, 3% under the same standard
JPEG without a network (docs/results.md).

Variants: `:small`, filters for a CPU; `:tiny`.

The options of the seed: see ljpeg/configs/ljpeg.py.
"""

from typing import Any

import ml_collections

from common import hyper
from ljpeg.configs import ljpeg

_PRE_EDIT: dict[str, Any] = {
  "train_data_config.batchsize": 8,
  "train_data_config.patchsize": 128,
  "train_eval_config.num_steps": 100_000,
  "train_eval_config.log_metrics_every_steps": 100,
  "train_eval_config.checkpoint_every_steps": 1_000,
  "train_eval_config.eval_every_steps": 5_000,
  "optimizer_config.learning_rate": 1e-4,
  "optimizer_config.prior_learning_rate_factor": 100.0,
  "optimizer_config.gradient_clip_norm": 1.0,
  "model_config.tables.init": "standard",
  "model_config.tables.learned": False,
  "model_config.coefficients": "round",
  "model_config.search": "",
  # Of the first convolution, the residual units, the last convolution.
  "model_config.pre_edit.filters": (64, 64, 64, 64, 128, 128, 3),
  "model_config.pre_edit.train_qualities": (5, 95),
}

_VARIANTS: dict[str, dict[str, Any]] = {
  "small": {
    "train_eval_config.num_steps": 400,
    "train_eval_config.log_metrics_every_steps": 50,
    "train_eval_config.checkpoint_every_steps": 200,
    "train_eval_config.eval_every_steps": 200,
    "optimizer_config.learning_rate": 1e-3,
    "optimizer_config.prior_learning_rate_factor": 10.0,
    "model_config.pre_edit.filters": (12, 12, 12, 3),
  },
  "tiny": {
    **ljpeg.TINY,
    "optimizer_config.learning_rate": 1e-3,
    "optimizer_config.prior_learning_rate_factor": 10.0,
    "model_config.pre_edit.filters": (4, 4, 6, 3),
  },
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  hyper.check_variant(variant, list(_VARIANTS))
  config = ljpeg.get_config()
  hyper.set_values(config, {**_PRE_EDIT, **(_VARIANTS[variant] if variant else {})})
  return config


def get_cfg_str(config: ml_collections.ConfigDict) -> str:
  return hyper.name_from(config, ["model_config.rd_lambda", "model_config.tables.quality"])


# Qualities whose tables suit a lambda: that of the steps in the middle of the luminance table.
_PAIRS = ((0.002, 15), (0.005, 30), (0.01, 50), (0.02, 70), (0.05, 85), (0.1, 92))


def get_hyper(variant: str = ""):
  pairs = _PAIRS[1:4] if variant == "tiny" else _PAIRS
  return hyper.zip(
    hyper.sweep("model_config.rd_lambda", [p[0] for p in pairs]),
    hyper.sweep("model_config.tables.quality", [p[1] for p in pairs]),
    hyper.sweep(
      "model_config.pre_edit.train_qualities",
      [(max(5, p[1] - 15), min(95, p[1] + 15)) for p in pairs],
    ),
  )
