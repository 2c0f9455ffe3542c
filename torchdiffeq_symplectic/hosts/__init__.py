"""One adapter a host, and what adapters share. torchdiffeq is required; torchdyn is patched when it is imported."""
