"""One adapter a host. torchdiffeq is required; an adapter of another host is used where that host is installed."""
