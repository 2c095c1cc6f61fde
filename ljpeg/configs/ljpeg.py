"""Learned JPEG, tables only: Strümpler, Yang and Timofte 2020 (arXiv 2009.12927), learned rate.

    python -m ljpeg.train --config ljpeg/configs/ljpeg.py
    ./launch.py --main ljpeg.train --config ljpeg/configs/ljpeg.py --jobs 2          (the sweep)
    ./launch_eval.py --workdirs 'train_xms/<xid>/wid=*' --dataset kodak

Costs about 35 s of one processor a rate. Measured on Kodak with `search="default"`: from 0.19 bpp
at 25.9 dB over 0.61 bpp at 31.5 dB to 1.76 bpp at 38.6 dB, 34% under Pillow's 4:4:4 files by PSNR
(docs/results.md).

Variants: `:tiny` (seconds, generated pictures), `:seed` (the seed's loss), `:lpips` (LPIPS in
the loss; needs its weights, `python -m common.lpips_weights`), `:tiny_lpips`, `:tiny_seed`.

Losses, with D = MSE on the 0..255 scale + lpips_weight * LPIPS and q the tables' 128 entries:

  loss="rate"     bits per pixel + rd_lambda * D + total_weight_regularizer * sum(1/q)
  loss="weights"  rd_lambda * D + total_weight_regularizer * sum(1/q)            (the seed's)

The seed's options:

| there | here |
|---|---|
| checkpoint_dir | `--workdir` (resume), `--experiments_dir`, `--xid` |
| train_glob | `train_data_config.dataset` (a folder, a glob or a name) |
| batchsize, patchsize | `train_data_config.batchsize`, `.patchsize` |
| lambda | `model_config.rd_lambda` |
| last_step | `train_eval_config.num_steps` |
| lr | `optimizer_config.learning_rate` (of the logarithms of the tables' entries) |
| lr_decay (after 10,000 steps) | `optimizer_config.decay_factor`, `.schedule=piecewise` |
| lpips_weight | `model_config.lpips_weight` |
| total_weight_regularizer | `model_config.total_weight_regularizer` |
"""

from typing import Any

import ml_collections
from ml_collections import config_dict

from common import hyper

# The seed's sweep, and a rate in its widest gap.
LAMBDAS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  hyper.check_variant(variant, list(_VARIANTS))
  config = ml_collections.ConfigDict()

  config.train_data_config = ml_collections.ConfigDict(
    dict(
      dataset="cid22-train",  # A name in configs.py, a folder or a glob.
      batchsize=16,
      patchsize=128,
      patches_per_image=1,
      max_images=config_dict.placeholder(int),
      val_split=0.1,  # The part that is held back for validation; None for nothing.
      flip=True,
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

  num_steps = config_dict.FieldReference(150)
  config.train_eval_config = ml_collections.ConfigDict(
    dict(
      num_steps=num_steps,
      seed=0,
      log_metrics_every_steps=20,
      checkpoint_every_steps=75,
      eval_every_steps=75,
      max_ckpts_to_keep=2,
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
      warm_start_rescale=False,  # Of no use here: there is no grid to be finer.
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
      learning_rate=0.04,  # Adam moves a table's entry by up to 4% a step.
      prior_learning_rate_factor=1.0,  # For the rate model.
      schedule="cosine",  # Or "piecewise", "constant".
      warmup_steps=(num_steps * 0.02).to_int(),
      decay_after_steps=10_000,  # With "piecewise".
      decay_factor=0.01,
      gradient_clip_norm=1e3,
    )
  )

  config.model_config = ml_collections.ConfigDict(
    dict(
      rd_lambda=0.01,
      rd_lambda_warmup_steps=0,
      rd_lambda_warmup_factor=1.0,
      rd_lambda_warmup_below=0.0,
      loss="rate",  # Or "weights": see above.
      lpips_weight=0.0,
      total_weight_regularizer=0.0,
      subsampling="4:4:4",  # Or "4:2:0".
      tables=dict(
        init="flat",  # Or "standard": the Independent JPEG Group's, of `quality`.
        quality=75,
        learned=True,
        learning_rate_factor=1.0,  # How much faster than the networks they learn.
      ),
      # What coefficients become: "round", or "rdo": whole numbers that minimise bits + rd_lambda *
      # squared error jointly over a block (a trellis), in training and in files.
      coefficients="rdo",
      # How gradients pass that choice. "exact": for tables, coefficients are held constant, the
      # derivative of a minimum; networks see what lies at a threshold (codec.py has the details).
      # "ste": straight through; "cubic": 3 (z - round z)^2.
      rounding="exact",
      # What files hold: "", those coefficients; "fast", "default" or "best", those that a longer
      # search finds for the same loss and the file's own Huffman codes (ljpeg/rdo.py).
      search="default",
      # "runs": the format's run-length code with learned code lengths; "frequency": a density for
      # each frequency.
      rate="runs",
      quantizer="unoise",  # The noise that "frequency" is trained with; "runs" needs none.
      attention=dict(
        backbone="",  # ljpeg/configs/attention.py
        channels=64,
        weight=0.0,  # Of the mean factor in the loss.
      ),
      pre_edit=dict(
        filters=(),  # ljpeg/configs/pre_edit.py
        train_qualities=(),
      ),
    )
  )

  hyper.set_values(config, _VARIANTS[variant] if variant else {})
  return config


# A training of seconds: generated pictures, small crops.
TINY: dict[str, Any] = {
  "train_data_config.dataset": "sample_train",
  "train_data_config.batchsize": 4,
  "train_data_config.patchsize": 128,
  "val_data_config.batchsize": 4,
  "val_data_config.patchsize": 128,
  "val_data_config.max_images": 8,
  "train_eval_config.num_steps": 60,
  "train_eval_config.log_metrics_every_steps": 10,
  "train_eval_config.checkpoint_every_steps": 30,
  "train_eval_config.eval_every_steps": 30,
  "optimizer_config.learning_rate": 0.05,
}

_SEED: dict[str, Any] = {
  "model_config.loss": "weights",
  "model_config.total_weight_regularizer": 1.0,
  "model_config.coefficients": "round",
  "model_config.rounding": "cubic",
  "model_config.search": "",
}

_LPIPS: dict[str, Any] = {
  "train_data_config.batchsize": 8,
  "train_eval_config.num_steps": 60,
  "optimizer_config.learning_rate": 0.06,
  "model_config.lpips_weight": 500.0,
  "model_config.coefficients": "round",
  "model_config.search": "",
}

_VARIANTS: dict[str, dict[str, Any]] = {
  "tiny": TINY,
  "seed": _SEED,
  "lpips": _LPIPS,
  "tiny_seed": {**TINY, **_SEED},
  "tiny_lpips": {**_LPIPS, **TINY},
}


def get_cfg_str(config: ml_collections.ConfigDict) -> str:
  return hyper.name_from(config, ["model_config.rd_lambda", "model_config.loss"])


def get_hyper(variant: str = ""):
  if variant.startswith("tiny"):
    return hyper.sweep("model_config.rd_lambda", [0.002, 0.01, 0.05])
  return hyper.sweep("model_config.rd_lambda", list(LAMBDAS))
