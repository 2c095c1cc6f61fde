"""Standard JPEG by Pillow over a sweep of qualities: nothing is learned, only evaluated.

    python -m ljpeg.pillow_eval --config ljpeg/configs/pillow.py --dataset kodak
    python -m ljpeg.pillow_eval --config ljpeg/configs/pillow.py:optimized --dataset kodak

The files have libjpeg's standard tables. The seed's `_output_PIL` is the config as it stands.
`python -m common.classical --codec jpeg444` makes the same files and calls them a classical codec;
here they are a run of the family, beside its trained ones. `:tiny` has three qualities.
"""

import ml_collections

from common import hyper

VARIANTS = ("tiny", "optimized", "420", "420_optimized")
QUALITIES = (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 95)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  hyper.check_variant(variant, VARIANTS)
  config = ml_collections.ConfigDict()
  config.model_config = ml_collections.ConfigDict(
    dict(
      quality=75,  # 1 to 100.
      subsampling="4:2:0" if variant.startswith("420") else "4:4:4",
      optimize=variant.endswith("optimized"),  # Huffman codes of each picture's own.
    )
  )
  return config


def get_cfg_str(config: ml_collections.ConfigDict) -> str:
  return hyper.name_from(config, ["model_config.quality"])


def get_hyper(variant: str = ""):
  return hyper.sweep("model_config.quality", (20, 50, 80) if variant == "tiny" else QUALITIES)
