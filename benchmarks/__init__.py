"""Each module prints one table: slime beside a peer or a limit, in one run."""
