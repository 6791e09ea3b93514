"""Several vLLM servers on one machine, kept alive and served behind one OpenAI-compatible address."""

__version__ = "0.1.0"
