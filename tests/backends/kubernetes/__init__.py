"""The Kubernetes backend without a cluster: tests over recordings and an API server that answers from a script."""
