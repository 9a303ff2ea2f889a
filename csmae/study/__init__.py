"""What a study file says: base configuration, search space and search settings; neither Ray nor torch."""
