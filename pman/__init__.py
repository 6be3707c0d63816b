"""pman renders job requests into the language of a scheduler, submits them, and reports what became of them."""

__version__ = "7.0.0"
