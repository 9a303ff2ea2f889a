"""BigEarthNet's file formats; nothing in a file is trusted or executed."""
