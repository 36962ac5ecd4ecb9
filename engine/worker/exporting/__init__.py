"""Results made into models for other programs: merged, compared, described, converted, uploaded."""
