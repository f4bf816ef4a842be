"""Networks of published systems; each is one class, trained and run by `derain.methods.regression.RegressionModule`."""
