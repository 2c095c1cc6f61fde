"""Four rates of one model in half an hour on two CPU cores: better than JPEG, and than WebP.

    ./launch.py --sweep sweeps/half_hour.py --executor local
    ./launch_eval.py --workdirs 'train_xms/<xid>/wid=*' --dataset kodak

`mshyper/configs/bls2017.py:small` on `cid22-train`. The rate in the middle trains for a quarter of
an hour; each other one begins with the weights of a rate beside it, its latents multiplied for the
new lambda, and trains for four minutes. What makes that enough is measured in docs/results.md,
"Half an hour": rounded latents for the synthesis, learning rates that spare the DCT of the
beginning, and rescaled warm starts.

`:trial` takes a tenth of the steps: to see whether all of it runs.
"""

from typing import Any

from common import hyper

VARIANTS = ("trial",)
FIRST_STEPS, FURTHER_STEPS = 4_800, 1_350


def get_sweep(variant: str = "") -> list[hyper.Part]:
  hyper.check_variant(variant, VARIANTS)
  share = 0.1 if variant else 1.0
  settings = [
    {
      "model_config.rd_lambda": 0.01,
      "train_eval_config.num_steps": int(FIRST_STEPS * share),
      "train_eval_config.eval_every_steps": int(FIRST_STEPS * share),
    },
    _further(0.04, "wid=0", share),
    _further(0.0035, "wid=0", share),
    _further(0.0012, "wid=2", share),
  ]
  return [hyper.Part("mshyper.train", "mshyper/configs/bls2017.py:small", settings)]


def _further(rd_lambda: float, source: str, share: float) -> dict[str, Any]:
  return {
    "model_config.rd_lambda": rd_lambda,
    "train_eval_config.num_steps": int(FURTHER_STEPS * share),
    "train_eval_config.eval_every_steps": int(FURTHER_STEPS * share),
    "train_eval_config.warm_start": source,
    "train_eval_config.warm_start_rescale": True,
    "optimizer_config.learning_rate": 5e-4,
    "optimizer_config.warmup_steps": 20,
  }
