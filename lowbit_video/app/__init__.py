"""The roof: the command line and what it runs; the only folder that imports all others."""
