"""pman over HTTP."""
