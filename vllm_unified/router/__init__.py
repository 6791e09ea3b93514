"""The one door: key, routing by model, streaming, health."""
