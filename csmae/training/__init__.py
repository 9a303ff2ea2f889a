"""Pretraining: the one loop, its schedule and its checkpoints."""
