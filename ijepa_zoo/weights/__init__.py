"""Weights, in and out.

In: catalog (what exists) -> fetch (bring it here, by download, ranged, torch_file and
safetensors_file) -> read (open any file; config checks what a folder says, networks is the result)
-> layouts (rename) -> load (fit and assign). Out: bundle -> export -> writers, card.
"""
