"""The state of a server, and OpenAI's API over HTTP."""
