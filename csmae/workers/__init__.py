"""Worker groups: a Tune trainable whose Ray Train workers start once and train one trial after another."""
