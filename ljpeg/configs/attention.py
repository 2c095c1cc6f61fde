"""Learned JPEG with attention: Strümpler, Yang and Timofte 2020 (arXiv 2009.12927).

    python -m ljpeg.train --config ljpeg/configs/attention.py
    ./launch.py --main ljpeg.train --config ljpeg/configs/attention.py --jobs 2     (the sweep)

A network gives every block a factor in (0, 1) for each frequency of luminance and chrominance; the
divided coefficients are multiplied by it before they are rounded. Tables and network are trained
together. Only the encoder changes: files are standard .jpg files.

Costs about two minutes of one processor a rate. Measured on Kodak: from 0.27 bpp at 26.9 dB to 1.17
bpp at 34.9 dB (rd_lambda 0.0025 to 0.05), 2% under rounding without a network; the search of
ljpeg.py saves 13% (docs/results.md).

`model_config.attention.backbone` is "cnn" (small, trained along), "alexnet" (fixed; the weights of
LPIPS, `python -m common.lpips_weights`) or "vgg19" (fixed; block3_pool as the paper has it; Keras
downloads the weights). Variants: `:tiny`; `:seed`, the seed's loss with VGG19 and LPIPS.

The options of the seed: see ljpeg/configs/ljpeg.py.
"""

from typing import Any

import ml_collections

from common import hyper
from ljpeg.configs import ljpeg

_ATTENTION: dict[str, Any] = {
  "train_data_config.batchsize": 8,
  "train_data_config.patchsize": 128,
  "train_eval_config.num_steps": 400,
  "train_eval_config.checkpoint_every_steps": 200,
  "train_eval_config.eval_every_steps": 200,
  "optimizer_config.learning_rate": 1e-3,
  "optimizer_config.prior_learning_rate_factor": 30.0,
  "model_config.tables.learning_rate_factor": 30.0,
  "optimizer_config.gradient_clip_norm": 10.0,
  "model_config.coefficients": "round",
  "model_config.search": "",
  "model_config.attention.backbone": "cnn",
}

_VARIANTS: dict[str, dict[str, Any]] = {
  "tiny": {
    **ljpeg.TINY,
    "optimizer_config.learning_rate": 1e-3,
    "model_config.attention.channels": 8,
  },
  "seed": {
    "model_config.loss": "weights",
    "model_config.total_weight_regularizer": 1.0,
    "model_config.lpips_weight": 500.0,
    "model_config.rounding": "cubic",
    "model_config.attention.backbone": "vgg19",
    "model_config.attention.weight": 1.0,
  },
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  hyper.check_variant(variant, list(_VARIANTS))
  config = ljpeg.get_config()
  hyper.set_values(config, {**_ATTENTION, **(_VARIANTS[variant] if variant else {})})
  return config


def get_cfg_str(config: ml_collections.ConfigDict) -> str:
  return hyper.name_from(config, ["model_config.rd_lambda", "model_config.attention.backbone"])


def get_hyper(variant: str = ""):
  return ljpeg.get_hyper(variant)
