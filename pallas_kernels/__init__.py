"""Attention over a compressed key-value cache: arrays in, arrays out.

This package knows no model and no cache object. `packing` defines the one layout that every
implementation reads, and `sketch_attention` attends to it.
"""
