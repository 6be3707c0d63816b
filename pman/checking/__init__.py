"""What `pman check` knows."""
