"""Docker, Podman and Swarm: engines that speak the Docker Engine API."""
