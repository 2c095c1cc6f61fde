"""Iterative inference on mshyper models: the latents of given pictures, weights frozen.

    python -m mshyper.itinf --config mshyper/configs/itinf.py \
      --config.train_eval_config.warm_start_exp_dir=train_xms/<xid> \
      --config.train_eval_config.warm_start_wid=<N> --config.data_config.dataset=kodak

Costs 3000 steps of the hyper-synthesis and the synthesis, forward and backward, for each image.
Measured: 300 steps on a `mbt2018.py:small` run take 50 s a Kodak picture on 2 CPU cores and 5.9%
off the rate-distortion cost in files (docs/results.md); the 3000 steps were not. `itinf.py:tiny`
makes 100 steps. The sweep takes the seven runs of an experiment, `itinf.py:two_layer_syn2` the
fourteen of that config.

The temperature of a method that has one is tau(t) = upper exp(-rate (t - start)), at most upper, at
least 1e-8. Settings of the papers and their code:

| method | num_steps | temperature_rate | temperature_start_step | temperature_upper |
|---|---|---|---|---|
| sga (Yang and Mandt 2023; the defaults) | 3000 | 5e-4 | 200 | 0.5 |
| sga (Yang et al. 2020) | 2000 | 1e-3 | 700 | 0.5 |
| danneal (Yang et al. 2020) | 2000 | 4e-3 | 402 | 0.2 |
| SGA+ (sga_linear, ... sga3_ssl; rate as Yang et al. 2020) | 2000 | 1e-3 | 0 | 1 |

common/quantizers.py says what each method computes.
"""

import ml_collections
from ml_collections import config_dict

from common import hyper

VARIANTS = ("tiny", "two_layer_syn2")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  hyper.check_variant(variant, VARIANTS)
  config = ml_collections.ConfigDict()
  config.data_config = ml_collections.ConfigDict(
    dict(
      dataset="kodak",
      batchsize=4,  # Images of one shape go together.
    )
  )
  num_steps = config_dict.FieldReference(3_000)
  config.train_eval_config = ml_collections.ConfigDict(
    dict(
      num_steps=num_steps,
      seed=0,
      log_metrics_every_steps=100,
      warm_start_exp_dir="",  # The trained experiment (train_xms/<xid>) or run; required.
      warm_start_wid=config_dict.placeholder(int),  # Its work unit.
    )
  )
  config.itinf_config = ml_collections.ConfigDict(
    dict(
      # Or danneal, sga_linear, sga_cosine, sga_ssl, sga3_linear, sga3_cosine, sga3_ssl,
      # soft_round, ste, unoise.
      method="sga",
      learning_rate=5e-3,
      decay_after_steps=(num_steps * 0.9).to_int(),  # Then a tenth of the learning rate.
      temperature_rate=5e-4,
      temperature_start_step=200,
      # None in all of these: the method's default.
      temperature_upper=config_dict.placeholder(float),  # sga 0.5, danneal 0.2, SGA+ 1.
      sigmoid_scale=config_dict.placeholder(float),  # a of sga_ssl (2.3) and sga3_ssl (1.4).
      three_class_factor=config_dict.placeholder(float),  # Distances times this, of sga3_*.
      three_class_power=config_dict.placeholder(float),  # Sharpness of sga3_*.
    )
  )
  # Overrides of the trained run's model_config; None keeps what it was trained with.
  config.model_config = ml_collections.ConfigDict(dict(rd_lambda=config_dict.placeholder(float)))
  if variant == "tiny":
    hyper.set_values(
      config,
      {
        "data_config.dataset": "sample",
        "train_eval_config.num_steps": 100,
        "train_eval_config.log_metrics_every_steps": 10,
        "itinf_config.learning_rate": 2e-2,
        "itinf_config.temperature_rate": 3e-2,
        "itinf_config.temperature_start_step": 20,
      },
    )
  return config


def get_cfg_str(config: ml_collections.ConfigDict) -> str:
  return hyper.name_from(
    config, ["itinf_config.method", "data_config.dataset", "train_eval_config.warm_start_wid"]
  )


def get_hyper(variant: str = ""):
  # One work unit a run of the trained experiment: seven rates, the four of a :tiny sweep, or the
  # fourteen settings of two_layer_syn2.py.
  count = {"tiny": 4, "two_layer_syn2": 14}.get(variant, 7)
  return hyper.sweep("train_eval_config.warm_start_wid", range(count))
