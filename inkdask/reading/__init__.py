"""How layers become a lazy volume: found, parsed once, read in blocks."""
