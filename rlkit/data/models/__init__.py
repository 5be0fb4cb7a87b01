"""Loads, builds, runs and saves models."""
