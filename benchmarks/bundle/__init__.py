"""What the offline bundle and downloads cost, beside the plain tools for the same bytes."""
