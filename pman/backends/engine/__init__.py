"""Docker, Podman and Swarm: engines that speak the Docker Engine API.

docker.py and swarm.py are the backends, each with its table of states. Change api.py for how an engine is asked,
store.py for the volume of all jobs, live.py for what the check asks, overview.py for what is told of nodes, and
former.py for jobs of pman 4 to 6. images.py and start.py serve docker.py alone: when an image is pulled, and how a
container is started once.
"""
