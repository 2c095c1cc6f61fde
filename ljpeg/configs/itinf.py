"""Iterative inference for standard JPEG: coefficients and tables for each of the given pictures.

    python -m ljpeg.itinf --config ljpeg/configs/itinf.py \
      --config.train_eval_config.warm_start_exp_dir=train_xms/<xid> \
      --config.train_eval_config.warm_start_wid=<N> --config.data_config.dataset=kodak

Files: `itinf_xms/<xid>/wid=*/images/<image>/image.jpg`.

  method="search"  the coefficients with the file's own run lengths and Huffman codes, in turn with
                   the file's own tables, which begin at the trained ones (`ljpeg.rdo`)
  method="sga"     (or another of common/quantizers.py) the divided coefficients, by gradients of
                   the rate model that was trained with the tables; the tables stay

The search is the default: it minimises the bits of the file itself. `:tiny` makes 30 steps of SGA
on `sample`. The other fields are explained in factorized/configs/itinf.py.
"""

import ml_collections
from ml_collections import config_dict

from common import hyper

VARIANTS = ("tiny",)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  hyper.check_variant(variant, VARIANTS)
  config = ml_collections.ConfigDict()
  config.data_config = ml_collections.ConfigDict(dict(dataset="kodak", batchsize=2))
  num_steps = config_dict.FieldReference(300)
  config.train_eval_config = ml_collections.ConfigDict(
    dict(
      num_steps=num_steps,
      seed=0,
      log_metrics_every_steps=20,
      warm_start_exp_dir="",  # The trained experiment (train_xms/<xid>) or run; required.
      warm_start_wid=config_dict.placeholder(int),  # Its work unit.
    )
  )
  config.itinf_config = ml_collections.ConfigDict(
    dict(
      method="search",
      learning_rate=1e-2,
      decay_after_steps=(num_steps * 0.9).to_int(),  # Then a tenth of the learning rate.
      temperature_rate=1e-2,
      temperature_start_step=20,
      # None in all of these: the method's default.
      temperature_upper=config_dict.placeholder(float),
      sigmoid_scale=config_dict.placeholder(float),
      three_class_factor=config_dict.placeholder(float),
      three_class_power=config_dict.placeholder(float),
    )
  )
  config.model_config = ml_collections.ConfigDict(
    dict(
      rd_lambda=config_dict.placeholder(float),  # None: as trained.
      # SGA begins at the divided coefficients, not at whole numbers that were chosen already.
      coefficients="round",
    )
  )
  if variant == "tiny":
    hyper.set_values(
      config,
      {
        "data_config.dataset": "sample",
        "itinf_config.method": "sga",
        "train_eval_config.num_steps": 30,
        "train_eval_config.log_metrics_every_steps": 10,
        "itinf_config.learning_rate": 3e-2,
        "itinf_config.temperature_rate": 1e-1,
        "itinf_config.temperature_start_step": 5,
      },
    )
  return config


def get_cfg_str(config: ml_collections.ConfigDict) -> str:
  return hyper.name_from(
    config, ["itinf_config.method", "data_config.dataset", "train_eval_config.warm_start_wid"]
  )


def get_hyper(variant: str = ""):
  # One work unit a run of the trained experiment: the rates of ljpeg.py, or of ljpeg.py:tiny.
  return hyper.sweep("train_eval_config.warm_start_wid", range(3 if variant == "tiny" else 7))
