"""Shared by all folders of `esper_train`: settings, names, state, signals, devices."""
