"""Measurements: what the documentation's numbers come from. Not part of the installed package."""
