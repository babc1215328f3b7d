"""Our layer beside its peers, on this machine: `python -m launch.benchmark --help` says how."""
