"""Plain classes that do the work: sampling, scoring, learning. `controller/cluster.py` wraps them in actors."""
