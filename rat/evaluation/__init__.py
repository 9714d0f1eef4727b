"""What trained models know: scores of answers, and loss by position."""
