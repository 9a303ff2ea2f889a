"""Plots, reports, model cards and exported encoders, built from stored results."""
