"""Plots and reports of studies, from the trial store and the trials' files."""
