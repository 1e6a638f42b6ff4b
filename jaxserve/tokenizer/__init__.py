"""Text to tokens and back: tokenizers, chat templates, and decoding a stream token by token."""
