"""What a run is on disk: its folder, checkpoints, provenance, resuming and drift."""
