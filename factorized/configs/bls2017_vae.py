"""A VAE of the BLS2017 architecture, for Variational Bayesian Quantization (Yang et al. 2020).

    python -m factorized.train --config factorized/configs/bls2017_vae.py
    python -m factorized.vbq_eval --workdir RUN --calibration cid22-train --dataset kodak

One model for all rates: it is trained without quantization, and lambda is chosen when encoding. The
defaults are those of the published colour experiment: 2 million steps (flat after 1 million) of 64
crops of 256x256, Adam 1e-4, a standard normal prior. Costs weeks of a GPU.

`bls2017_vae.py:small` starts from a DCT and is sized for about ten minutes on two cores, on real
photographs (`cid22-train`); `bls2017_vae.py:tiny` is the same idea on generated pictures.
"""

import math

import ml_collections
from ml_collections import config_dict

from common import hyper
from factorized.configs import bls2017


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  hyper.check_variant(variant, list(_VARIANTS))
  config = bls2017.get_config()

  config.train_data_config.batchsize = 64
  num_steps = config_dict.FieldReference(2_000_000)
  config.train_eval_config.num_steps = num_steps
  config.optimizer_config = ml_collections.ConfigDict(
    dict(
      learning_rate=1e-4,
      prior_learning_rate_factor=10.0,  # Of a learned prior: 1e-3.
      schedule="constant",
      warmup_steps=0,
      decay_after_steps=num_steps,
      decay_factor=1.0,
      gradient_clip_norm=1.0,
    )
  )

  likelihood_variance = config_dict.FieldReference(0.001)  # Of pixels in 0..1.
  config.model_config = ml_collections.ConfigDict(
    dict(
      likelihood_variance=likelihood_variance,
      learned_prior=False,  # A density a channel in place of the standard normal.
      # Follows: bits per pixel + rd_lambda * MSE (0..255) is the negative ELBO.
      rd_lambda=1 / likelihood_variance * (3 / (2 * math.log(2) * 255**2)),
      rd_lambda_warmup_steps=0,
      rd_lambda_warmup_factor=1.0,
      rd_lambda_warmup_below=0.0,
      quantizer="gnoise",  # One sample of the posterior.
      init="random",  # Or "dct".
      # Two outputs a latent: means, then log variances.
      analysis=dict(
        name="BLS2017Analysis", num_filters=256, output_channels=512, gdn_gamma_init=0.1
      ),
      synthesis=dict(name="BLS2017Synthesis", num_filters=256, in_channels=256, gdn_gamma_init=0.1),
    )
  )

  if variant:
    hyper.set_values(config, _VARIANTS[variant])
  return config


# As in bls2017.py: a DCT to start from, a high learning rate that falls to the end, small crops.
_SHORT = {
  "train_data_config.batchsize": 8,
  "train_data_config.patchsize": 128,
  "train_data_config.flip": True,
  "val_data_config.patchsize": 128,
  "optimizer_config.learning_rate": 1e-3,
  "optimizer_config.prior_learning_rate_factor": 30.0,
  "optimizer_config.schedule": "cosine",
  "optimizer_config.decay_factor": 0.01,
  "optimizer_config.gradient_clip_norm": 20.0,
  "model_config.init": "dct",
  "model_config.learned_prior": True,
  "model_config.analysis.output_channels": 640,
  "model_config.analysis.gdn_gamma_init": 0.01,
  "model_config.synthesis.in_channels": 320,
  "model_config.synthesis.gdn_gamma_init": 0.01,
}

_VARIANTS = {
  "tiny": {
    **_SHORT,
    "train_data_config.dataset": "sample_train",
    "train_eval_config.num_steps": 1_000,
    "train_eval_config.log_metrics_every_steps": 50,
    "train_eval_config.checkpoint_every_steps": 200,
    "train_eval_config.eval_every_steps": 500,
    "model_config.analysis.num_filters": 96,
    "model_config.synthesis.num_filters": 96,
  },
  "small": {
    **_SHORT,
    "train_data_config.dataset": "cid22-train",
    "train_data_config.val_split": None,
    "val_data_config.dataset": "cid22-valid",
    "train_eval_config.num_steps": 7_000,
    "train_eval_config.checkpoint_every_steps": 1_000,
    "train_eval_config.eval_every_steps": 1_000,
    "model_config.analysis.num_filters": 128,
    "model_config.synthesis.num_filters": 128,
  },
}


def get_cfg_str(config: ml_collections.ConfigDict) -> str:
  return hyper.name_from(
    config,
    [
      "model_config.likelihood_variance",
      "model_config.learned_prior",
      "model_config.analysis.num_filters",
    ],
  )


def get_hyper(variant: str = ""):
  return hyper.product(
    hyper.sweep("model_config.likelihood_variance", [0.001, 0.004]),
    hyper.sweep("model_config.learned_prior", [False, True]),
  )
