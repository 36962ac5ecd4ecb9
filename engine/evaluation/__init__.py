"""The spec of an evaluation, its report, and the probe at the end of a training run."""
