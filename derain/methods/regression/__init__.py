"""Training of networks by losses between their outputs and clean images: most published systems."""
