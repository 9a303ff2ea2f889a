"""Archives on disk become batches of Sentinel-1/Sentinel-2 pairs in memory."""
