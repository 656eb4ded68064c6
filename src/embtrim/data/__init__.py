"""From a raw log to an encoded dataset: reading, drafting a schema, splitting, encoding, and the known datasets."""
