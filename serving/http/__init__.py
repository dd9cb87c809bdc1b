"""The HTTP gateway: OpenAI shapes over a `Backend`, a registry and a blob store. Ray is not imported here."""
