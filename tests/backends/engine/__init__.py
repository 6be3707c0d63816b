"""Swarm, Docker and Podman without an engine: tests over a fake of the Engine API."""
