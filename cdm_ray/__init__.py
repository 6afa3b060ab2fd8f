"""Diffusion models that are consistent with their own samples, trained at scale on Ray."""
