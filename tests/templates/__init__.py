"""Chat templates of real models, conversations for them, and an oracle of its own for what has to be trained."""
