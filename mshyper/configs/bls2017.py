"""The three-layer transforms of Ballé, Laparra and Simoncelli 2017 with a mean-scale hyperprior.

    ./launch.py --main mshyper.train --config mshyper/configs/bls2017.py
    ./launch.py --sweep sweeps/half_hour.py             (four rates in half an hour on two cores)

Half the FLOPs of mbt2018.py a pixel at equal widths, for the first layer takes a quarter of the
samples in each direction, with mixed quantization: for short trainings the best of this folder.
With the widths of the paper it was not trained.

`bls2017.py:tiny` trains four rates, 1,000 steps each, sized for two cores, on generated pictures;
`bls2017.py:small` is one rate of `sweeps/half_hour.py`, a quarter of an hour on two cores and real
photographs (`cid22-train`); docs/results.md has its figures. `bls2017.py:example` is the model that
ships with the project, a smaller one for low rates.
"""

import ml_collections

from common import hyper
from mshyper.configs import mbt2018


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  hyper.check_variant(variant, list(_VARIANTS))
  config = mbt2018.get_config()
  config.model_config.quantizer = "mixedq"
  config.model_config.analysis = ml_collections.ConfigDict(
    dict(name="BLS2017Analysis", num_filters=192, output_channels=320, gdn_gamma_init=0.1)
  )
  config.model_config.synthesis = ml_collections.ConfigDict(
    dict(name="BLS2017Synthesis", num_filters=192, in_channels=320, gdn_gamma_init=0.1)
  )
  if variant:
    hyper.set_values(config, _VARIANTS[variant])
  return config


# The DCT is not to be lost in the first steps: a slow warm-up, small kernels at small rates.
_SHORT = {
  "optimizer_config.learning_rate": 8e-4,
  "optimizer_config.warmup_steps": 50,
  "optimizer_config.rates_by_size": True,
  "model_config.analysis.gdn_gamma_init": 0.01,
  "model_config.synthesis.gdn_gamma_init": 0.01,
}
_VARIANTS = {
  "tiny": {
    **mbt2018.TINY,
    **_SHORT,
    "model_config.analysis.num_filters": 96,
    "model_config.synthesis.num_filters": 96,
  },
  "small": {
    **mbt2018.SMALL,
    **_SHORT,
    "train_eval_config.num_steps": 4_800,
    "model_config.analysis.num_filters": 128,
    "model_config.synthesis.num_filters": 128,
  },
  "example": {
    **mbt2018.SMALL,
    **_SHORT,
    "train_eval_config.num_steps": 2_400,
    "model_config.rd_lambda": 0.004,
    "model_config.analysis.num_filters": 96,
    "model_config.analysis.output_channels": 192,
    "model_config.synthesis.num_filters": 96,
    "model_config.synthesis.in_channels": 192,
    "model_config.hyper_analysis.in_channels": 192,
    "model_config.hyper_analysis.bottleneck_size": 64,
    "model_config.hyper_synthesis.in_channels": 64,
    "model_config.hyper_synthesis.bottleneck_size": 192,
  },
}


def get_cfg_str(config: ml_collections.ConfigDict) -> str:
  return hyper.name_from(config, ["model_config.rd_lambda", "model_config.analysis.num_filters"])


def get_hyper(variant: str = ""):
  return mbt2018.get_hyper(variant)
