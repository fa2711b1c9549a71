"""The ops, each a folder: the definition in `reference`, and a module for each backend beside
it."""
