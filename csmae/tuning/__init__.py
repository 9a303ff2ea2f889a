"""The search: Optuna proposes trials, Ray Tune runs them on worker groups."""
