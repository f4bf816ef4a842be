"""Syn2Real: semi-supervised training by a Gaussian process of the features."""
