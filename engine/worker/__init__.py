"""The part that imports torch. It runs in child processes only; nothing outside this folder imports it."""
