"""DA-CLIP + IR-SDE."""
