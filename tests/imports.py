"""Imports of the training commands, for `tests.forks`."""

import gc

import derain.commands.train
import derain.methods.cliprpn.module
import derain.methods.daclipsde.module
import derain.methods.plnlingan.module
import derain.methods.prenet.module
import derain.methods.restormer.module
import derain.restoration  # noqa: F401

gc.collect()
gc.freeze()  # forked processes need not search what is imported for garbage
