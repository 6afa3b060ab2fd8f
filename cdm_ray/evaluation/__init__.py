"""Evaluation: samples, feature statistics, Fréchet distance, drift diagnostics, figures."""
