"""Turn results into models for other programs: merge, compare, describe, convert, upload."""
