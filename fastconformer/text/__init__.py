"""Text: tokens, pieces, error rates."""
