"""Job + site -> text."""
