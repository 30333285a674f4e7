"""What a look-up costs, beside what it would cost otherwise. See README.md here."""
