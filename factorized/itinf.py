"""python -m factorized.itinf --config factorized/configs/itinf.py."""

from common import cli


def _build(model_config):
  """A codec whose rounded latents can be optimised.

  Raises:
    ValueError: It is a VAE, which has none.
  """
  from factorized.codec import FactorizedCodec, build

  codec = build(model_config)
  if not isinstance(codec, FactorizedCodec):
    raise ValueError(
      "This run is a VAE: iterative inference is for rounded latents. Its rates come from "
      "python -m factorized.vbq_eval."
    )
  return codec


def check(unit):
  """Raises for a work unit that cannot run, before anything is written."""
  from common import itinf_lib

  itinf_lib.check(unit, _build)


def run(job):
  """Optimises the latents of the data set's images."""
  from common import itinf_lib

  itinf_lib.run(job, _build)


if __name__ == "__main__":
  cli.main("factorized", "itinf", run, check)
