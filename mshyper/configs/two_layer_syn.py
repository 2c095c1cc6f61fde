"""Two-layer synthesis with a linear branch and ELIC's analysis, Yang and Mandt 2023.

    ./launch.py --main mshyper.train --config mshyper/configs/two_layer_syn.py

Costs 1.8 million steps of 8 crops of 256x256: days on a GPU. Published on Kodak (arXiv 2304.06244):
from 0.115 bpp at 27.27 dB to 1.306 bpp at 38.79 dB; 10680 FLOPs a pixel for the synthesis.
`two_layer_syn.py:tiny` trains four rates, 1,000 steps each, sized for two cores, on generated
pictures; `two_layer_syn.py:small` is for about eight minutes on two cores and real photographs.
"""

import ml_collections

from common import hyper
from mshyper.configs import jpegl, mbt2018


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  hyper.check_variant(variant, ["tiny", "small"])
  config = jpegl.get_config()
  config.model_config.synthesis = ml_collections.ConfigDict(
    dict(
      name="TwoLayerResSynthesis",
      in_channels=320,
      channels=(12, 3),  # Between the layers, and of the image.
      strides=(8, 2),
      kernel_sizes=(13, 5),
      activation_type="igdn",
      gdn_gamma_init=0.1,
      res_type="conv",  # The linear branch; or "d2s".
    )
  )
  if variant:
    short = {"tiny": mbt2018.TINY, "small": mbt2018.SMALL}[variant]
    hyper.set_values(config, {**short, **jpegl.TINY_ELIC})
    config.model_config.synthesis.gdn_gamma_init = 0.01
  return config


def get_cfg_str(config: ml_collections.ConfigDict) -> str:
  return hyper.name_from(config, ["model_config.rd_lambda", "model_config.synthesis.channels"])


def get_hyper(variant: str = ""):
  return mbt2018.get_hyper(variant)
