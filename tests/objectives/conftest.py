"""Makes the cases of this folder importable from the folders below it."""
