"""One policy update against a TrainBackend: the recipe, the losses, and the seam between them and a library."""
