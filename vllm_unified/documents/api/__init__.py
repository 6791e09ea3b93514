"""The paths of the document service: ours, and those of the applications that it replaces."""
