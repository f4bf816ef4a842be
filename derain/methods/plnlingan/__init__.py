"""PLNLIN-MCDDL (Wang et al., MM 2024): local / non-local interactive generator, deeply discriminative training."""
