"""Weights, in and out.

In: registry (what exists) -> download (fetch it) -> read (open any checkpoint; configs of folders)
-> formats (rename) -> load (fit shapes and assign). Out: export -> writers.
"""
