"""The logs in run/logs: lines of JSON, how they are written, read together, and shown to people."""
