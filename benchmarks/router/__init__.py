"""Gateways side by side, in front of the same engine without a model."""
