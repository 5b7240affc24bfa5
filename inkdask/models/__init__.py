"""The networks, what is known about them, and how their weights are found and read."""
