"""Documents in, Markdown out: a service beside the router that reads images and PDFs with the OCR model."""
