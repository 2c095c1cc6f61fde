"""Two-layer synthesis, plain CNN analysis, mixed quantization, Yang and Mandt 2023.

    ./launch.py --main mshyper.train --config mshyper/configs/two_layer_syn2.py

Costs 1.8 million steps of 8 crops of 256x256 a setting: days on a GPU; the sweep has 14 of them.
Its authors found it to improve on two_layer_syn.py in additional experiments (the repository of
arXiv 2304.06244).
`two_layer_syn2.py:tiny` trains four rates, 1,000 steps each, sized for two cores, on generated
pictures; `two_layer_syn2.py:small` takes about ten minutes on two cores and real photographs
(`cid22-train`), docs/results.md has its figures.
"""

import ml_collections

from common import hyper
from mshyper.configs import mbt2018


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  hyper.check_variant(variant, list(_VARIANTS))
  config = mbt2018.get_config()
  config.train_eval_config.num_steps = 1_800_000
  config.model_config.quantizer = "mixedq"
  config.model_config.analysis = ml_collections.ConfigDict(
    dict(name="CNNAnalysis", channels_base=256, output_channels=320, activation_type="leaky_relu")
  )
  config.model_config.synthesis = ml_collections.ConfigDict(
    dict(
      name="TwoLayerSynthesis",
      in_channels=320,
      channels=(24, 3),  # Between the layers, and of the image.
      strides=(8, 2),
      kernel_sizes=(13, 5),
      activation_type="igdn",
      gdn_gamma_init=0.1,
    )
  )
  if variant:
    hyper.set_values(config, _VARIANTS[variant])
  return config


_SHORT = {"model_config.synthesis.gdn_gamma_init": 0.01}
_VARIANTS = {
  "tiny": {**mbt2018.TINY, **_SHORT, "model_config.analysis.channels_base": 96},
  "small": {**mbt2018.SMALL, **_SHORT, "model_config.analysis.channels_base": 128},
}


def get_cfg_str(config: ml_collections.ConfigDict) -> str:
  return hyper.name_from(config, ["model_config.rd_lambda", "model_config.synthesis.channels"])


def get_hyper(variant: str = ""):
  rates = mbt2018.get_hyper(variant)
  if variant:
    return rates
  return hyper.product(rates, hyper.sweep("model_config.synthesis.channels", [(24, 3), (48, 3)]))
