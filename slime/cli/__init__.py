"""The `slime` console command; thin."""
