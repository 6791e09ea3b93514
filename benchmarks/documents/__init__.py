"""The document service in front of an OCR engine without a model."""
