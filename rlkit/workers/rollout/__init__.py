"""Engines that sample responses, behind one interface (`engine.py`)."""
