"""Scheduling and memory accounting. Never imports torch."""
