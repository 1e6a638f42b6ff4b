"""Structured output: grammars that hold answers to a JSON schema, a regular expression, a choice or a grammar."""
