"""What generated answers are worth: metrics on texts, and how sure their values are."""
