"""What of the evaluation sets is among the rows."""
