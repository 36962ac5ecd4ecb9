"""The spec of an evaluation, its report, and the small probe at the end of a training."""
