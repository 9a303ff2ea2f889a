"""Worker groups: a Tune trainable that keeps Ray Train's workers warm and hands them one trial after another."""
