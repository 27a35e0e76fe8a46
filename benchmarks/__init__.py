"""What the project promises about time, measured beside the raw limit and the peers; `make bench`."""
