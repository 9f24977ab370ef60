"""What is timed: spinlm's public surfaces, and those of the libraries it is compared with."""
