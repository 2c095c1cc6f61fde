"""The mean-scale hyperprior family (Minnen, Ballé, Toderici, 2018)."""
