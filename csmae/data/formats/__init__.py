"""BigEarthNet's file formats, read without trusting a byte of them."""
