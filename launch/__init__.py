"""Starts the programs of `experiments` on machines: builds command lines and manifests, and knows nothing of JAX."""
