"""JPEG-like synthesis (one transposed convolution) and ELIC's analysis, Yang and Mandt 2023.

    ./launch.py --main mshyper.train --config mshyper/configs/jpegl.py

Costs 1.8 million steps of 8 crops of 256x256: days on a GPU. Published on Kodak (arXiv 2304.06244):
from 0.124 bpp at 26.95 dB to 1.438 bpp at 39.01 dB; 2433 FLOPs a pixel for the synthesis.
`jpegl.py:tiny` trains four rates, 1,000 steps each, sized for two cores, on generated pictures;
`jpegl.py:small` is for about eight minutes on two cores and real photographs (`cid22-train`).
"""

import ml_collections

from common import hyper
from mshyper.configs import mbt2018

ELIC = dict(name="ElicAnalysis", channels=(192, 192, 192, 320), num_residual_blocks=3)
TINY_ELIC = {
  "model_config.analysis.channels": (48, 64, 96, 320),
  "model_config.analysis.num_residual_blocks": 1,
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  hyper.check_variant(variant, ["tiny", "small"])
  config = mbt2018.get_config()
  config.train_eval_config.num_steps = 1_800_000
  config.model_config.analysis = ml_collections.ConfigDict(ELIC)
  config.model_config.synthesis = ml_collections.ConfigDict(
    dict(name="JPEGLikeSynthesis", in_channels=320, kernel_size=18, strides=16, use_offset=False)
  )
  if variant:
    short = {"tiny": mbt2018.TINY, "small": mbt2018.SMALL}[variant]
    hyper.set_values(config, {**short, **TINY_ELIC})
  return config


def get_cfg_str(config: ml_collections.ConfigDict) -> str:
  return hyper.name_from(config, ["model_config.rd_lambda", "model_config.synthesis.kernel_size"])


def get_hyper(variant: str = ""):
  return mbt2018.get_hyper(variant)
