"""From rows to tokens: examples, packing, splits, the cache of prepared data."""
