"""Prompts, rewards, environments and models: what a run reads."""
