"""Number formats: encodings, words, bitmasks, stored weights."""
