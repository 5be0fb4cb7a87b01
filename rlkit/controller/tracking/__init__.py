"""What a run leaves behind and shows while it runs: console, run folder, TensorBoard, Weights & Biases, plots, summary."""

from rlkit.controller.tracking.tracker import Tracker

__all__ = ["Tracker"]
