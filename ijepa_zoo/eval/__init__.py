"""Probes of frozen features and fine-tuning: the protocols of the I-JEPA paper."""
