"""Published networks, which `derain.methods.regression.RegressionModule` and its subclasses train and run."""

NETWORKS = (
    "derain.networks.drsformer.DRSformer",
    "derain.networks.promptir.PromptIR",
    "derain.networks.mprnet.MPRNet",
    "derain.networks.nledn.NLEDN",
    "derain.networks.airnet.AirNet",
    "derain.networks.amir.AMIR",
    "derain.networks.hct_ffn.HCTFFN",
    "derain.networks.transweather.TransWeather",
    "derain.networks.rcdnet.RCDNet",
    "derain.networks.spanet.SPANet",
    "derain.networks.dcsfn.DCSFN",
    "derain.networks.rescan.RESCAN",
    "derain.networks.swinir.SwinIR",
    "derain.networks.brn.BRN",
    "derain.networks.rpdnet.RPDNet",
    "derain.networks.vrgnet.VRGNet",
    "derain.networks.syn2real.Syn2Real",
    "derain.networks.ssid_kd.SSIDKD",
    "derain.networks.nerd_rain.NeRDRain",
    "derain.networks.nafnet.NAFNet",
    "derain.networks.restormer.Restormer",
)
"""Class paths of the networks, in the order in which they are tried for an authors' weights file."""
