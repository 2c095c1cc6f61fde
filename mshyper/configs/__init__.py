"""Experiment configs of the mean-scale hyperprior family."""
