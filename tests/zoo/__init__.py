"""Tiny random models of every transformers family, made from their configuration classes alone."""
