"""The players: one base model with an adapter, and the log-probs they give to responses."""
