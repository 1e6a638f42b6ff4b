"""The HTTP routes, a file a subject; each function answers one route."""
