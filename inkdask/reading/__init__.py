"""From the files of a segment to a lazy volume: find layers, parse headers, read blocks."""
