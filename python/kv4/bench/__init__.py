"""Measurements: decode attention, sealing, and generation with a whole model."""
