"""Chat rows to token samples, tokenised once, packed into rows."""
