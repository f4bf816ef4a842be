"""SSID-KD: the semi-supervised stage, with priors of images and matched features."""
