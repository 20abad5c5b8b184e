"""The HTTP side of serving: OpenAI's completions and chat completions, metrics and a page, in front of an engine."""
