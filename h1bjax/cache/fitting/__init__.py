"""What calibration fits to a sample of one layer's queries and keys, without gradients."""
