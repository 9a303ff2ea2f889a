"""Strategies: which trial trains next, for how long, and which one stops. Plain Python without Ray, torch or a clock."""
