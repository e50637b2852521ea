"""Three sites train one model on phantom scans: `python -m demo`."""
