"""Chat templates: what they write, where the answers are in it, the loss mask and its proof."""
