"""Can a picture be believed? Variants of a run side by side, and controls."""
