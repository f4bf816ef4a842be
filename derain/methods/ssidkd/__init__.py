"""SSID-KD (Cui et al., TCSVT 2022): semi-supervised stage, with image priors and a divergence of features."""
