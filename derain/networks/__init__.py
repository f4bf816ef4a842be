"""Networks of published systems, which `derain.methods.regression.RegressionModule` trains and runs."""

NETWORKS = (
    "derain.networks.drsformer.DRSformer",
    "derain.networks.promptir.PromptIR",
    "derain.networks.mprnet.MPRNet",
    "derain.networks.nledn.NLEDN",
    "derain.networks.amir.AMIR",
    "derain.networks.spanet.SPANet",
    "derain.networks.dcsfn.DCSFN",
    "derain.networks.rescan.RESCAN",
    "derain.networks.brn.BRN",
)
"""Class paths of the networks: a new one adds a line."""
