"""Finished runs side by side: ``python -m gwpf_baseline.report RUN RUN``."""
