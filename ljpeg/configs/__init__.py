"""Experiment configs of the ljpeg family: get_config(), get_cfg_str(), get_hyper()."""
