"""Restormer (Zamir et al., CVPR 2022), the transformer that CLIP-RPN extends."""
