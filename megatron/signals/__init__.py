"""Signals: what the controllers are told, reduced over all ranks."""
