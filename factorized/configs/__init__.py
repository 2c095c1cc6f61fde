"""Experiment configs of the factorized family: get_config(), get_cfg_str(), get_hyper()."""
