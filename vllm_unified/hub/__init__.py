"""Models from Hugging Face and ModelScope: fetched, verified, brought on a stick, removed."""
