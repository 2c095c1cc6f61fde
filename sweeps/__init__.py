"""Sweeps of several configs, each one experiment: ./launch.py --sweep sweeps/NAME.py.

A sweep file imports common.hyper, and what it likes of the families' configs:

    def get_sweep():
      rates = hyper.sweep("model_config.rd_lambda", [0.08, 0.02, 0.005])
      return [
        hyper.Part("mshyper.train", "mshyper/configs/mbt2018.py:small", hyper.from_first(rates)),
        hyper.Part("factorized.train", "factorized/configs/bls2017.py:small"),
      ]
"""
