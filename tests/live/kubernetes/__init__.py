"""The Kubernetes backend on a real cluster."""
