"""One vLLM server a model: where it runs, how it is started, who keeps it alive."""
