"""Optuna proposes, Ray Tune executes: a study file explored by warm groups of workers."""
