"""One folder a library; each satisfies a seam and none knows another."""
