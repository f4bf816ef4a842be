"""PReNet (Ren et al., CVPR 2019): progressive recurrent network, the baseline of the field."""
