"""Syn2Real (Yasarla et al., CVPR 2020): semi-supervised training by a Gaussian process of the features."""
