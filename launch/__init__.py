"""Training recipes on top of `sync_splitbn`; run one with `accelerate launch -m launch.<name>`."""
