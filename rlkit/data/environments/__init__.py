"""Multi-turn environments and tools: what answers the policy between its turns."""

from rlkit.data.environments.protocol import Environment, Step, Unavailable

__all__ = ["Environment", "Step", "Unavailable"]
