"""A server's state, and OpenAI's interface over HTTP."""
