"""Mean-scale hyperprior: Minnen, Ballé and Toderici 2018 (arXiv 1809.02736), no autoregression.

    python -m mshyper.train --config mshyper/configs/mbt2018.py
    ./launch.py --main mshyper.train --config mshyper/configs/mbt2018.py            (the sweep)

Costs 2 million steps of 8 crops of 256x256: days on a GPU.

`mbt2018.py:tiny` trains four rates, 1,000 steps each, sized for two cores, on generated pictures.
`mbt2018.py:small` takes about ten minutes on two cores and real photographs (`cid22-train`);
docs/results.md has its figures. Both start from a DCT instead of noise (`init="dct"`).

The other configs of this folder are this one with other transforms.
"""

from typing import Any

import ml_collections
from ml_collections import config_dict

from common import hyper


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  hyper.check_variant(variant, list(_VARIANTS))
  config = ml_collections.ConfigDict()

  config.train_data_config = ml_collections.ConfigDict(
    dict(
      dataset="cid22-train",  # A name in configs.py, a folder or a glob.
      batchsize=8,
      patchsize=256,
      patches_per_image=1,
      max_images=config_dict.placeholder(int),
      val_split=0.1,  # The part that is held back for validation; None for nothing.
      flip=False,
      cache_mb=2048,  # Decoded images kept in memory.
    )
  )
  config.val_data_config = ml_collections.ConfigDict(
    dict(
      dataset=config_dict.placeholder(str),  # None: the part held back by val_split, if any.
      batchsize=8,
      patchsize=256,
      max_images=64,
    )
  )
  config.test_data_config = ml_collections.ConfigDict(
    dict(
      dataset=config_dict.placeholder(str),  # Crops to measure once, at the end; None: no test.
      batchsize=8,
      patchsize=256,
      max_images=config_dict.placeholder(int),
    )
  )

  num_steps = config_dict.FieldReference(2_000_000)
  config.train_eval_config = ml_collections.ConfigDict(
    dict(
      num_steps=num_steps,
      seed=0,
      log_metrics_every_steps=100,
      checkpoint_every_steps=5_000,
      eval_every_steps=10_000,
      max_ckpts_to_keep=5,
      keep_best=True,  # By validation loss.
      # Ends after so many evaluations without a better validation loss, with the best checkpoint
      # as the newest, which it then is at num_steps too; None: the newest is the last step's.
      early_stopping_patience=config_dict.placeholder(int),
      strategy="one_device",  # Or "mirrored" (all GPUs of a node), "multi_worker".
      num_replicas=config_dict.placeholder(int),  # Of each worker; None: one a GPU.
      log_images_every_evals=1,
      num_images_to_log=4,
      warm_start=config_dict.placeholder(str),  # A checkpoint, a run, or an experiment.
      warm_start_wid=config_dict.placeholder(int),  # With an experiment; None: this run's wid.
      warm_start_partial=False,  # True: take what fits by name and shape, log what does not.
      # True: multiply the latents by the root of the ratio of the two runs' rd_lambda, so that they
      # begin on the grid that suits this one.
      warm_start_rescale=False,
      # Of averages of the weights, such as 0.9999, which are what is validated, evaluated and
      # exported; None: none.
      ema_decay=config_dict.placeholder(float),
      # Or "mixed_float16", "mixed_bfloat16": convolutions in 16 bits, in training only. For GPUs:
      # on a CPU a step of bls2017.py:tiny takes 2.5 times as long in bfloat16, 100 in float16.
      precision_policy=config_dict.placeholder(str),
      check_numerics=False,  # True: stop at the first NaN or infinity, and name its operation.
    )
  )

  # Steps that derive from num_steps move with it.
  config.optimizer_config = ml_collections.ConfigDict(
    dict(
      learning_rate=1e-4,
      prior_learning_rate_factor=1.0,  # For the prior of the hyper-latents.
      schedule="piecewise",  # Or "cosine", "constant".
      warmup_steps=(num_steps * 0.02).to_int(),
      decay_after_steps=(num_steps * 0.8).to_int(),
      decay_factor=0.1,
      gradient_clip_norm=1.0,
      # True: kernels whose initial values are small learn slower (common/optimizers.py), which
      # spares the DCT that a training starts from.
      rates_by_size=False,
    )
  )

  config.model_config = ml_collections.ConfigDict(
    dict(
      rd_lambda=0.01,  # Loss: bits per pixel + rd_lambda * MSE on the 0..255 scale.
      # Ten times lambda first, where lambda is at most `below`: reconstruction before rate.
      rd_lambda_warmup_steps=(num_steps * 0.2).to_int(),
      rd_lambda_warmup_factor=10.0,
      rd_lambda_warmup_below=0.01,
      quantizer="unoise",  # Or "mixedq".
      init="random",  # Or "dct".
      prior_init_scale=10.0,
      exact_coding=True,  # False: files decode faster, but surely only where they were made.
      analysis=dict(
        name="MBT2018Analysis", channels_base=192, output_channels=320, gdn_gamma_init=0.1
      ),
      synthesis=dict(
        name="MBT2018Synthesis", channels_base=192, in_channels=320, gdn_gamma_init=0.1
      ),
      hyper_analysis=dict(name="HyperAnalysis", in_channels=320, bottleneck_size=320),
      hyper_synthesis=dict(name="HyperSynthesis", in_channels=320, bottleneck_size=320),
    )
  )

  if variant:
    hyper.set_values(config, _VARIANTS[variant])
  return config


# What a short training needs: a DCT to start from, a high learning rate that falls to the end,
# small batches, no lambda warm-up, a small hyperprior. The crops stay large: one of 128 has 2x2
# hyper-latents, all of them at an edge, and what it teaches costs twice the bits on whole pictures
# (docs/results.md).
_SHORT: dict[str, Any] = {
  "train_data_config.batchsize": 2,
  "train_data_config.flip": True,
  "val_data_config.batchsize": 2,
  "optimizer_config.learning_rate": 1e-3,
  "optimizer_config.prior_learning_rate_factor": 30.0,
  "optimizer_config.schedule": "cosine",
  "optimizer_config.decay_factor": 0.01,
  "model_config.init": "dct",
  "model_config.rd_lambda_warmup_factor": 1.0,
  "model_config.hyper_analysis.bottleneck_size": 128,
  "model_config.hyper_synthesis.in_channels": 128,
}

# For all models of this folder: on generated pictures, and on photographs.
TINY: dict[str, Any] = {
  **_SHORT,
  "train_data_config.dataset": "sample_train",
  "train_eval_config.num_steps": 1_000,
  "train_eval_config.log_metrics_every_steps": 50,
  "train_eval_config.checkpoint_every_steps": 200,
  "train_eval_config.eval_every_steps": 500,
}
SMALL: dict[str, Any] = {
  **_SHORT,
  "train_data_config.dataset": "cid22-train",
  "train_data_config.val_split": None,
  "val_data_config.dataset": "cid22-valid",
  "train_eval_config.num_steps": 3_500,
  "train_eval_config.checkpoint_every_steps": 1_000,
  "train_eval_config.eval_every_steps": 2_000,
}
TINY_LAMBDAS = [0.04, 0.016, 0.0063, 0.0025]
LAMBDAS = [0.08, 0.04, 0.02, 0.01, 0.005, 0.0025, 0.00125]

_GDN = {
  "model_config.analysis.gdn_gamma_init": 0.01,
  "model_config.synthesis.gdn_gamma_init": 0.01,
}
_VARIANTS = {
  "tiny": {
    **TINY,
    **_GDN,
    "model_config.analysis.channels_base": 64,
    "model_config.synthesis.channels_base": 64,
  },
  "small": {
    **SMALL,
    **_GDN,
    "train_eval_config.num_steps": 2_500,  # About as long as the 3,500 of the shallow decoders.
    "model_config.analysis.channels_base": 96,
    "model_config.synthesis.channels_base": 96,
  },
}


def get_cfg_str(config: ml_collections.ConfigDict) -> str:
  return hyper.name_from(config, ["model_config.rd_lambda", "model_config.analysis.channels_base"])


def get_hyper(variant: str = ""):
  return hyper.sweep("model_config.rd_lambda", TINY_LAMBDAS if variant == "tiny" else LAMBDAS)
