"""Samplers: how a trained model is run."""
