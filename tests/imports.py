"""Imports of the training commands, for `tests.forks`."""

import derain.commands.train
import derain.methods.cliprpn.module
import derain.methods.daclipsde.module
import derain.methods.plnlingan.module
import derain.methods.prenet.module
import derain.methods.restormer.module
import derain.restoration  # noqa: F401
