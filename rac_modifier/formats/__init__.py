"""Number formats: grids, words, bitmasks, stored weights."""
