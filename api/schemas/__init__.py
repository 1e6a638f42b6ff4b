"""What clients may send: pydantic models, strict, each field with its meaning."""
