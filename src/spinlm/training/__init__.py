"""Training: the losses, the SPIN trainer, and the supervised stage."""
