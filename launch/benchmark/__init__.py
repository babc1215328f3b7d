"""`python -m launch.benchmark`: the layer beside what one would use instead of it."""
