"""What the editors share, in plain torch: keys, target values, moments, solvers. Nothing here knows Lightning."""
