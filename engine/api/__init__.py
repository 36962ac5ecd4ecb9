"""OpenAI's interface for fine-tuning and chat: jobs are runs, files are data sets, models are results."""
