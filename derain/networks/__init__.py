"""Networks of published systems, which `derain.methods.regression.RegressionModule` trains and runs."""

NETWORKS: tuple[str, ...] = ()
"""Class paths of the networks: a new one adds a line."""
