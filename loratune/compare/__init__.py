"""Fair comparisons: the same task, data order and search for every variant, and what it cost."""
