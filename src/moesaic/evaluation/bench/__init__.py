"""Speed beside peers and beside the physical limit, checked for correctness before it is timed."""
